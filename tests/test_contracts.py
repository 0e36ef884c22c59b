"""What plain ``generate`` takes from a caller: every processor, criterion and streamer of transformers, and one's own.

FIELD L7: each is taken with ``apar=True``, or refused by name; and who keeps state across calls is not shared in silence.
"""

import asyncio
import inspect
import itertools
import threading
import time
from functools import partial

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import logits_process, stopping_criteria, streamers

from conftest import CHILD, EOS, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import AparConfig, ConfigurationError, enable_apar
from letter_tokenizer import letter_tokenizer

NO_FORK = AparConfig(fork_bias=float("-inf"))
PROMPTS = left_padded(random_prompts(5, seed=7))
ONE = {"input_ids": torch.tensor(random_prompts(1, seed=3))}
WIDTH = PROMPTS["input_ids"].shape[1]
SYNTH_ID = {"ngram_len": 3, "keys": [3, 4], "sampling_table_size": 64, "sampling_table_seed": 0, "context_history_size": 8}

WHISPER = GenerationConfig(eos_token_id=EOS, bos_token_id=EOS, no_timestamps_token_id=30, max_initial_timestamp_index=3)

PROCESSORS = {
    "MinLengthLogitsProcessor": lambda make: make(WIDTH + 9, EOS),
    "MinNewTokensLengthLogitsProcessor": lambda make: make(WIDTH, 9, EOS),
    "TemperatureLogitsWarper": lambda make: make(0.7),
    "RepetitionPenaltyLogitsProcessor": lambda make: make(1.6),
    "EncoderRepetitionPenaltyLogitsProcessor": lambda make: make(1.6, PROMPTS["input_ids"]),
    "TopPLogitsWarper": lambda make: make(0.8),
    "TopKLogitsWarper": lambda make: make(9),
    "TopHLogitsWarper": lambda make: make(0.8),
    "MinPLogitsWarper": lambda make: make(0.05),
    "TypicalLogitsWarper": lambda make: make(0.8),
    "EpsilonLogitsWarper": lambda make: make(0.01),
    "EtaLogitsWarper": lambda make: make(0.01),
    "NoRepeatNGramLogitsProcessor": lambda make: make(2),
    "EncoderNoRepeatNGramLogitsProcessor": lambda make: make(2, PROMPTS["input_ids"]),
    "SequenceBiasLogitsProcessor": lambda make: make([[[5], 3.0], [[6, 7], -9.0]]),
    "NoBadWordsLogitsProcessor": lambda make: make([[3], [5, 6]], eos_token_id=EOS),
    "PrefixConstrainedLogitsProcessor": lambda make: make(lambda row, ids: list(range(row, 20 + len(ids) % 5)), 1),
    "ForcedBOSTokenLogitsProcessor": lambda make: make(5),
    "ForcedEOSTokenLogitsProcessor": lambda make: make(WIDTH + 6, 9),
    "InfNanRemoveLogitsProcessor": lambda make: make(),
    "ExponentialDecayLengthPenalty": lambda make: make((3, 1.3), EOS, WIDTH),
    "LogitNormalization": lambda make: make(),
    "SuppressTokensAtBeginLogitsProcessor": lambda make: make([5, 6, 7], WIDTH),
    "SuppressTokensLogitsProcessor": lambda make: make([5, 6, FORK, CHILD]),
    "AlternatingCodebooksLogitsProcessor": lambda make: make(WIDTH, 20, 10),
    "BarkEosPrioritizerLogitsProcessor": lambda make: make(EOS, 0.2),
    "WatermarkLogitsProcessor": lambda make: make(48, "cpu"),
    "WhisperTimeStampLogitsProcessor": lambda make: make(WHISPER, WIDTH),
}
REFUSED = {
    "ClassifierFreeGuidanceLogitsProcessor": lambda make: make(1.5),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": lambda make: make(1.5, tiny_llama()),
    "SynthIDTextWatermarkLogitsProcessor": lambda make: make(**SYNTH_ID, device="cpu"),
    "WhisperNoSpeechDetection": lambda make: make(5, 4),
    "DiaClassifierFreeGuidanceLogitsProcessor": lambda make: make(1.5),
    "DiaEOSChannelFilterLogitsProcessor": lambda make: make(2, 9),
    "DiaEOSDelayPatternLogitsProcessor": lambda make: make([0, 1], 9, 40),
}
CRITERIA = {
    "MaxLengthCriteria": lambda make, words: make(WIDTH + 5),
    "EosTokenCriteria": lambda make, words: make([9, 15]),
    "StopStringCriteria": lambda make, words: make(words, ["a", "kb", "M"]),
    "MaxTimeCriteria": lambda make, words: make(0.0, initial_timestamp=time.time() - 1),
}
REFUSED_CRITERIA = {"ConfidenceCriteria": lambda make: make(0.5)}
STREAMERS = {"TextStreamer", "TextIteratorStreamer", "AsyncTextIteratorStreamer", "TextDiffusionStreamer"}


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


def classes(module, base):
    """The names of the subclasses of ``base`` that a module of transformers defines."""
    found = inspect.getmembers(module, lambda one: inspect.isclass(one) and issubclass(one, base) and one is not base)
    return {name for name, one in found if one.__module__ == module.__name__}


def here(names, module):
    """The classes called so that this release of transformers has."""
    return [name for name in names if hasattr(module, name)]


def test_l7_every_class_of_transformers_is_taken_or_refused():
    """This fails for a release that has a new one: add it to a table above, and to the documentation if it is refused."""
    processors = classes(logits_process, logits_process.LogitsProcessor)
    assert processors <= {*PROCESSORS, *REFUSED}
    assert classes(stopping_criteria, stopping_criteria.StoppingCriteria) <= {*CRITERIA, *REFUSED_CRITERIA}
    assert classes(streamers, streamers.BaseStreamer) <= STREAMERS


def plainly(model, prompts=PROMPTS, **options):
    """What ``generate`` gives without apar; control tokens stay suppressed also where a caller's own processor does that."""
    torch.manual_seed(0)
    return model.generate(**prompts, **{"max_new_tokens": 20} | options).tolist()


@pytest.mark.parametrize("name", here(PROCESSORS, logits_process))
@pytest.mark.parametrize("sample", [False, True])
def test_l7_without_forks_a_processor_object_does_what_it_does_in_generate(plain_llama, apar_llama, name, sample):
    def processors():
        return [PROCESSORS[name](getattr(logits_process, name))]

    expected = plainly(plain_llama, logits_processor=processors(), do_sample=sample)
    assert plainly(apar_llama, logits_processor=processors(), do_sample=sample, apar=NO_FORK) == expected
    forked = [
        apar_llama.generate(
            **ONE, apar=AparConfig(max_threads=threads), max_new_tokens=400, logits_processor=processors(),
            return_dict_in_generate=True,
        ).trees[0]
        for threads in ((1, 64) if not name.startswith("Encoder") else ())
    ]  # fmt: skip
    if forked and all(tree.closing_ids for tree in forked):
        assert forked[0].token_ids == forked[1].token_ids


@pytest.mark.parametrize("name", here(REFUSED, logits_process))
def test_l7_a_processor_that_cannot_follow_threads_is_refused_by_name(apar_llama, name):
    processor = REFUSED[name](getattr(logits_process, name))
    with pytest.raises(ConfigurationError, match=f"{name} cannot follow several threads"):
        apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=9, logits_processor=[processor])


def test_l7_a_watermark_of_the_context_is_taken_and_one_with_state_is_refused(plain_llama, apar_llama):
    options = {"watermarking_config": WatermarkingConfig(bias=4.0), "max_new_tokens": 20}
    assert plainly(apar_llama, apar=NO_FORK, **options) == plainly(plain_llama, **options)
    with pytest.raises(ConfigurationError, match="SynthIDTextWatermarkLogitsProcessor cannot follow"):
        apar_llama.generate(
            **PROMPTS, apar=True, max_new_tokens=5, watermarking_config=SynthIDTextWatermarkingConfig(3, [3, 4])
        )


@pytest.mark.parametrize("name", here(CRITERIA, stopping_criteria))
def test_l7_without_forks_a_criterion_object_does_what_it_does_in_generate(plain_llama, apar_llama, tokenizer, name):
    for index in range(5):
        one = {key: value[index : index + 1] for key, value in PROMPTS.items()}

        def criteria():
            return [CRITERIA[name](getattr(stopping_criteria, name), tokenizer)]

        expected = plainly(plain_llama, one, stopping_criteria=criteria())
        assert plainly(apar_llama, one, stopping_criteria=criteria(), apar=NO_FORK) == expected


def test_l7_eos_and_length_of_ones_own_hold_for_every_thread(apar_llama):
    own = [stopping_criteria.EosTokenCriteria([9, 15])]
    options = {"max_new_tokens": 120, "return_dict_in_generate": True}
    by_option = apar_llama.generate(**PROMPTS, apar=True, eos_token_id=[9, 15], **options)
    by_object = apar_llama.generate(**PROMPTS, apar=True, stopping_criteria=own, **options)
    assert [tree.to_dict() for tree in by_object.trees] == [tree.to_dict() for tree in by_option.trees]
    assert {thread.eos_token_id for tree in by_object.trees for thread in tree.threads} >= {9, 15}
    short = [stopping_criteria.MaxLengthCriteria(WIDTH + 12)]
    by_object = apar_llama.generate(**PROMPTS, apar=True, stopping_criteria=short, **options)
    by_option = apar_llama.generate(**PROMPTS, apar=True, **options | {"max_new_tokens": 12})
    assert by_object.sequences.tolist() == by_option.sequences.tolist()


@pytest.mark.parametrize("name", here(REFUSED_CRITERIA, stopping_criteria))
def test_l7_a_criterion_for_drafts_is_refused_by_name(apar_llama, name):
    criterion = REFUSED_CRITERIA[name](getattr(stopping_criteria, name))
    with pytest.raises(ConfigurationError, match=f"{name} judges the drafts of an assistant"):
        apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=9, stopping_criteria=[criterion])


# streamers


async def read_along(made, model, **options):
    """Generate in a thread of its own; return what a reader of the streamer that ``made`` makes gets meanwhile."""
    streamer = made()
    worker = threading.Thread(target=lambda: model.generate(**ONE, max_new_tokens=60, streamer=streamer, **options))
    worker.start()
    if hasattr(streamer, "__aiter__"):
        parts = [part async for part in streamer]
    else:
        parts = list(streamer) if hasattr(streamer, "__iter__") else []
    worker.join()
    return "".join(parts)


@pytest.mark.parametrize("name", here(sorted(STREAMERS), streamers))
def test_l7_every_streamer_gets_the_text_of_generate_and_with_forks_in_reading_order(
    plain_llama, apar_llama, tokenizer, name, capsys
):
    more = {"timeout": 60} if "Iterator" in name else {}

    def made():
        return getattr(streamers, name)(tokenizer, skip_prompt=True, skip_special_tokens=True, **more)

    def text(model, **options):
        return asyncio.run(read_along(made, model, **options)) or capsys.readouterr().out.rstrip("\n")

    assert text(apar_llama, apar=NO_FORK) == text(plain_llama)
    out = apar_llama.generate(**ONE, apar=True, max_new_tokens=60, return_dict_in_generate=True)
    assert len(out.trees[0].threads) > 1
    assert text(apar_llama, apar=True) == out.trees[0].text(tokenizer)


# processors and criteria that keep state


class Budget(LogitsProcessor):
    """At most so many calls without EOS: a budget that goes by its calls."""

    def __init__(self, left=5):
        self.left = left

    def __call__(self, input_ids, scores):
        self.left -= 1
        return scores


class Rows(Budget):
    def __init__(self):
        self.lefts = {"row": [5, 5]}

    def __call__(self, input_ids, scores):
        self.lefts["row"][0] -= 1
        return scores


class Counts(Budget):
    def __init__(self):
        self.counts = torch.zeros(48)

    def __call__(self, input_ids, scores):
        self.counts[input_ids[0, -1]] += 1
        return scores


class Phase(Budget):
    """Changes its state once, late: when a path has become long."""

    def __init__(self):
        self.phase = "begin"

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > WIDTH + 6:
            self.phase = "end"
        return scores


class Quota(StoppingCriteria):
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return False


def closure():
    left = 5

    def function(input_ids, scores):
        nonlocal left
        left -= 1
        return scores

    return function


def allowed():
    seen = None

    def function(row, ids):
        nonlocal seen
        seen = len(ids)
        return list(range(40))

    return function


class Inner:
    def __init__(self):
        self.left = 5


class Outer(Budget):
    def __init__(self):
        self.inner = Inner()

    def __call__(self, input_ids, scores):
        self.inner.left -= 1
        return scores


class Slotted:
    __slots__ = ("left",)

    def __init__(self):
        self.left = 5

    def __call__(self, input_ids, scores):
        self.left -= 1
        return scores


def counting():
    numbers = itertools.count()

    def function(input_ids, scores):
        next(numbers)
        return scores

    return function


def spend(left, input_ids, scores):
    left["tokens"] -= 1
    return scores


def by_default():
    def function(input_ids, scores, left=[5]):  # noqa: B006 - that is the case
        left[0] -= 1
        return scores

    return function


LEFT = 5


def by_global(input_ids, scores):
    global LEFT
    LEFT -= 1
    return scores


def unset():
    if False:
        late = 0

    def function(input_ids, scores):
        return scores if True else late

    return function


STATEFUL = {
    "an object within": (lambda: {"logits_processor": [Outer()]}, "Outer changed its inner"),
    "slots": (lambda: {"logits_processor": [Slotted()]}, "Slotted changed its left"),
    "a count": (lambda: {"logits_processor": [counting()]}, "function changed its numbers"),
    "a partial": (lambda: {"logits_processor": [partial(spend, {"tokens": 5})]}, "partial changed its args"),
    "a default": (lambda: {"logits_processor": [by_default()]}, "function changed its defaults"),
    "a global": (lambda: {"logits_processor": [by_global]}, "by_global changed its LEFT"),
    "an attribute": (lambda: {"logits_processor": [Budget()]}, "Budget changed its left"),
    "a list in a dict": (lambda: {"logits_processor": [Rows()]}, "Rows changed its lefts"),
    "a tensor in place": (lambda: {"logits_processor": [Counts()]}, "Counts changed its counts"),
    "late": (lambda: {"logits_processor": [Phase()]}, "Phase changed its phase"),
    "an enclosing variable": (lambda: {"logits_processor": [closure()]}, "function changed its left"),
    "a bound method": (lambda: {"logits_processor": [Budget().__call__]}, "Budget.__call__ changed its left"),
    "allowed tokens": (lambda: {"prefix_allowed_tokens_fn": allowed()}, "function changed its seen"),
    "a criterion": (lambda: {"stopping_criteria": [Quota()]}, "Quota changed its calls"),
}


@pytest.mark.parametrize("case", STATEFUL)
@pytest.mark.parametrize("drafts", [False, True])
def test_l7_who_changes_from_call_to_call_is_refused_by_name(apar_llama, case, drafts):
    make, message = STATEFUL[case]
    options = {"prompt_lookup_num_tokens": 2} if drafts else {}
    with pytest.raises(ConfigurationError, match=f"{message} when it was called: it keeps state .* generate without apar"):
        apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=200, **make(), **options)


class Memo(LogitsProcessor):
    """Answers by its arguments alone, and prepares, keeps and records things."""

    def __init__(self):
        self.ready, self.known, self.calls, self.previous = False, {}, [], None

    def __call__(self, input_ids, scores):
        self.ready = True
        self.calls.append(len(input_ids))
        for path in input_ids.tolist():
            self.known[tuple(path)] = len(path)
        return scores + (input_ids.sum(dim=1, keepdim=True) % 7 == 0)


class Says(Budget):
    stateless = True


def test_l7_a_variable_without_a_value_is_no_state(apar_llama):
    assert apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=5, logits_processor=[unset()]).shape[1] > WIDTH


def test_l7_what_answers_by_its_arguments_alone_may_prepare_keep_and_record(plain_llama, apar_llama):
    expected = plainly(plain_llama, logits_processor=[Memo()], max_new_tokens=60)
    memo, says, reader = Memo(), Says(), closure()
    reader.stateless = True
    options = {"logits_processor": [memo, says, reader], "max_new_tokens": 60}
    assert plainly(apar_llama, apar=NO_FORK, **options) == expected
    assert plainly(apar_llama, apar=True, **options) != expected
    assert says.left < 0 and len(memo.known) > 100 and len(memo.calls) > 50


@pytest.mark.parametrize("package", ["xgrammar.contrib.hf", "outlines.backends.llguidance", "transformers_cfg.generation"])
def test_l7_grammars_whose_state_cannot_be_seen_are_refused_by_their_package(apar_llama, package):
    made = type("Grammar", (LogitsProcessor,), {"__module__": package, "__call__": lambda self, ids, scores: scores})()
    with pytest.raises(ConfigurationError, match=f"Grammar of {package} keeps state from call to call"):
        apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=5, logits_processor=[made])
    made.stateless = True
    usual = apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=5)
    assert apar_llama.generate(**PROMPTS, apar=True, max_new_tokens=5, logits_processor=[made]).tolist() == usual.tolist()


def test_l7_the_models_own_watermark_option_is_no_longer_in_the_way():
    model = enable_apar(tiny_llama())
    model.generation_config.watermarking_config = WatermarkingConfig(bias=4.0)
    assert plainly(model, apar=NO_FORK) == plainly(model)
