"""What a tuned model does with prompts of our own that no recipe trains on: forks, ends, loops, steps, false forks."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.config import AparConfig
from hf_apar.data.extraction.repetition import repeated_share
from hf_apar.results import AparOutput, AparStats
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import encode_answer
from hf_apar.training.figures import Judged
from hf_apar.training.quality import false_forks, mean_nll
from hf_apar.tree.threads import Decodes, ParagraphTree

IN_PARTS = (
    "What are the benefits of learning a second language?",
    "How can I prepare for my first marathon?",
    "What are the main causes of traffic jams in cities?",
    "Explain why trees matter to a neighbourhood.",
    "What should a family consider before getting a dog?",
    "How does music affect people's mood?",
    "What would the world be like if nobody needed sleep?",
    "What are the differences between a lake and a sea?",
    "Which skills does a good nurse need?",
    "How do I keep my bicycle in good shape?",
    "What if dogs could talk?",
    "Describe the effects of tourism on small islands.",
    "How can you tell whether a friend is sad?",
    "What are the pros and cons of living near an airport?",
    "Tell me about the history of the bicycle.",
    "As an experienced gardener, what would you teach a beginner?",
)
"""Prompts whose answers should fork."""
WHOLE = (
    "What is the capital of Sweden?",
    "Who invented the telephone?",
    "What is 12 times 12?",
    "Solve 5x + 3 = 23 for x.",
    "Write a Python function that adds up a list of numbers.",
    "Write a JavaScript function that turns a word round.",
    "Which names occur in this text? Tom met Lucy in Rome.",
    "Translate into Spanish: Where is the station?",
    "Write a short birthday card to my aunt.",
    "You are a friendly dragon. Say good evening to the village.",
    "Write a polite email that cancels a dentist's appointment.",
    "Is a whale a fish?",
)
"""Prompts whose answers should not."""
EITHER = (
    "Write a review of a new mountain bicycle for a sports magazine.",
    "Draft an email that invites old classmates to a reunion.",
    "Write a short script for a video on how bread is made.",
    "Write a letter of thanks to the nurses of a hospital.",
    "Compose a blog post about a weekend in a small mountain village.",
    "Write a review of a comedy about two bakers.",
    "Imagine you are a zookeeper. Describe a night in the zoo.",
    "Pretend to be a worn-out teddy bear and tell us about your life.",
    "You are a ship's doctor. What do you say to a crew that wants to turn back?",
    "How many leaves does a large tree have? Explain how you get there.",
    "Roughly how many doors are there in New York? Reason it out for the reader.",
    "How many hours does a person spend in queues in a lifetime? Explain your estimate.",
)
"""Prompts that an answer in parts suits, or one without."""
PROMPTS = IN_PARTS + WHOLE + EITHER
"""All of them, in the order of :func:`evaluate`'s answers."""
LOOP = 0.3  # of its runs of five words that an answer repeats
AT_ONCE = 16  # prompts of a batch


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    fork_bias: float | None = None,
    repetition_penalty: float | None = None,
    max_new_tokens: int = 512,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> list[Judged]:
    """Answer :data:`IN_PARTS`, :data:`WHOLE` and :data:`EITHER` greedily, in threads and plainly, with an enabled ``model``.

    Args:
        fork_bias, repetition_penalty: in place of the checkpoint's.
        max_new_tokens: sampled tokens of an answer.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`.
    """
    options: dict[str, object] = {"max_new_tokens": max_new_tokens}
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    encode = partial(_encoded, tokenizer, chat_template_kwargs)
    return [
        judged
        for prompts, should_fork in ((IN_PARTS, True), (WHOLE, False), (EITHER, None))
        for judged in _batch(model, tokenizer, prompts, encode(prompts), should_fork, fork_bias, options)
    ]


def _encoded(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, object] | None, prompts: Sequence[str]
) -> list[list[int]]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [encode_chat(tokenizer, chat, chat_template_kwargs=chat_template_kwargs) for chat in chats]


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    should_fork: bool | None,
    fork_bias: float | None,
    options: Mapping[str, object],
) -> list[Judged]:
    batch = _padded(tokenizer, encoded, model)
    apar = True if fork_bias is None else AparConfig(fork_bias=fork_bias)
    generate = cast(Callable[..., object], model.generate)  # the stubs take it for a module
    out = generate(**batch, apar=apar, return_dict_in_generate=True, do_sample=False, **options)
    plainly = cast(torch.Tensor, generate(**batch, do_sample=False, **options))  # (prompts, tokens)
    assert isinstance(out, AparOutput) and out.trees is not None and out.stats is not None
    width = batch["input_ids"].shape[1]
    return [
        _judged(prompt, should_fork, tree, stats, row[width:], tokenizer)
        for prompt, tree, stats, row in zip(prompts, out.trees, out.stats, plainly.tolist(), strict=True)
    ]


def _judged(
    prompt: str,
    should_fork: bool | None,
    tree: ParagraphTree,
    stats: AparStats,
    plain: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Judged:
    decoder = cast(Decodes, tokenizer)  # the stubs of `decode` allow for batches
    text, children, ended = tree.text(decoder), len(tree.threads) - 1, bool(tree.closing_ids)
    return Judged(
        prompt=prompt,
        text=text,
        should_fork=should_fork,
        children=children,
        ended=ended,
        looped=repeated_share(text) > LOOP,
        false_forks=children if should_fork is False else false_forks(tree, decoder),
        tokens=stats.tokens,
        steps=stats.steps if ended else max(stats.tokens, stats.steps),
        plain=decoder.decode(plain, skip_special_tokens=True),
        plain_ended=tokenizer.eos_token_id in plain,
    )


def plain_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    repetition_penalty: float = 1.0,
    max_new_tokens: int = 512,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> list[str]:
    """Return what ``model`` answers to ``prompts`` greedily, in batches of :data:`AT_ONCE`; it need not know how to fork."""
    encoded = _encoded(tokenizer, chat_template_kwargs, prompts)
    generate = cast(Callable[..., torch.Tensor], model.generate)
    answers: list[str] = []
    for start in range(0, len(encoded), AT_ONCE):
        batch = _padded(tokenizer, encoded[start : start + AT_ONCE], model)
        rows = generate(**batch, do_sample=False, max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty)
        answers += tokenizer.batch_decode(rows[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def likelihoods(
    judged: Sequence[Judged],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    own: Sequence[str],
    *,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Return what ``base``, the model before its tuning, thinks of the answers of :func:`evaluate`.

    Args:
        own: the base's answers to the same prompts (:func:`plain_answers`), best with the repetition penalty that the tuned
            model decodes with, since both change by it.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`.

    Returns:
        ``nll``, ``nll_plain`` and ``nll_base``: nats a token of the answers in threads, of the tuned model's plain ones and
        of the base's own, each answer that has a token counting alike. A tuned model that writes as it used to has three
        figures that are close.
    """
    prompts = _encoded(tokenizer, chat_template_kwargs, [one.prompt for one in judged])
    ways = {"nll": [one.text for one in judged], "nll_plain": [one.plain for one in judged], "nll_base": own}
    values = {
        name: [
            mean_nll(base, [prompt], [encode_answer(tokenizer, prompt, text)])
            for prompt, text in zip(prompts, texts, strict=True)
            if text
        ]
        for name, texts in ways.items()
    }
    return {name: sum(found) / max(len(found), 1) for name, found in values.items()}


def _padded(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], model: PreTrainedModel
) -> Mapping[str, torch.Tensor]:
    """Return the prompts as a batch, padded on the left, with a token that is masked where the tokenizer has none for it."""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    gaps = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
    ids = [[padding] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * len(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    return {name: torch.tensor(rows, device=model.device) for name, rows in (("input_ids", ids), ("attention_mask", mask))}


def write_evaluation(judged: Sequence[Judged], figures: Mapping[str, float], path: Path) -> None:
    """Write the figures and the answers to ``path``, as JSON."""
    record = {"summary": dict(figures), "answers": [asdict(one) for one in judged]}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
