"""The trainings with the fields of their settings among the other options."""

from dataclasses import fields

from hf_apar.training import fine_tuning, heads
from hf_apar.training.tuning import HeadsTuning, Selection, Tuning


def _split(kind, options):
    names = {one.name for one in fields(kind)}
    return kind(**{name: options[name] for name in names & options.keys()}), {
        name: value for name, value in options.items() if name not in names
    }


def train(answers, output, selection=Selection(), **options):
    tuning, others = _split(Tuning, options)
    return fine_tuning.train(answers, output, selection, tuning, **others)


def train_medusa(model, tokenizer, answers, output, **options):
    tuning, others = _split(HeadsTuning, options)
    return heads.train_medusa(model, tokenizer, answers, output, tuning, **others)
