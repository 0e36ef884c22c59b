"""The training mixture: answers as trees, structured and whole ones in a fixed proportion, some held out."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_apar.data.distillation.batches import TextAnswer
from hf_apar.data.extraction.markdown import extract
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.records.chats import ChatAnswer, Message, chat_answers
from hf_apar.data.records.files import usable
from hf_apar.data.records.rejections import Rejected, Rejections
from hf_apar.errors import DataError
from hf_apar.text.chat import check_written, encode_chat
from hf_apar.training.held_out import held_out_places, prompt_key
from hf_apar.training.rows.collator import pack
from hf_apar.training.rows.features import TreeFeatures, tree_features, truncate, unforked
from hf_apar.training.selection import is_selected
from hf_apar.training.tuning import Selection, Tuning

logger = logging.getLogger(__name__)


def packed_rows(
    answers: Path,
    tokenizer: PreTrainedTokenizerBase,
    control_ids: tuple[int, int],
    *,
    max_length: int = Tuning.max_length,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> list[dict[str, list[int]]]:
    """Return every answer of a file as rows, several to one, for
    :class:`~hf_apar.training.rows.collator.DataCollatorForApar`.

    Args:
        answers: as for :func:`read_examples`.
        control_ids: of [Fork] and [Child].
        max_length: tokens of a row; of a longer answer the last threads are left out.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`.

    Records that cannot be used are left out, and a warning tells of them.

    Raises:
        DataError: if no record can be used.
    """
    rejected = Rejections(answers)
    trees = _with_features(read_examples(answers, rejected), tokenizer, control_ids, chat_template_kwargs, rejected)
    cut = [truncate(features, max_length) for _, features in trees]
    return [row.to_dict() for row in pack(cut, max_length)]


@dataclass(frozen=True)
class Mixture:
    """Trees of tokens to train on and to judge by, and the deepest thread among them."""

    train: list[TreeFeatures]
    held_out: list[TreeFeatures]
    max_depth: int


def read_examples(path: Path, rejected: Rejections | None = None) -> list[ChatAnswer]:
    """Read the answers of chats, with the trees that ``hf-apar extract`` found; extracted now where they have none.

    Args:
        path: as for :func:`~hf_apar.data.records.files.open_records`: what ``hf-apar distill`` or ``hf-apar extract``
            wrote, or chats in any form of :func:`~hf_apar.data.records.chats.read_chat`.
        rejected: takes the records that cannot be used; by default a warning tells of them.

    Raises:
        DataError: if none can be used.
    """
    wanted = "chats, a prompt and a response, or what `hf-apar extract` writes"
    chats = usable(path, lambda record, number: list(chat_answers(record, number)), wanted, rejected)
    return [answer for answers in chats for answer in answers]


_Tree = tuple[ChatAnswer, TreeFeatures]


def training_mixture(
    answers: Sequence[TextAnswer | ChatAnswer],
    tokenizer: PreTrainedTokenizerBase,
    control_ids: tuple[int, int],
    selection: Selection = Selection(),
    *,
    max_length: int = Tuning.max_length,
    seed: int = 0,
    rejected: Rejections | None = None,
    chat_template_kwargs: Mapping[str, object] | None = None,
    sequential: bool = False,
) -> Mixture:
    """Extract the trees of ``answers`` without one, and make of them what ``selection`` says.

    Answers of more than ``max_length`` tokens are left out. So are those that do not fork and hold a list with bold titles:
    whether such a list forks should depend on nothing small. Of a prompt, and of a chat, all answers are held out or none.

    Args:
        rejected: takes the answers that the tokenizer's chat template refuses, beside what it holds already; a warning
            tells of all.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`; a record's own tools go before.
        sequential: give each of these answers, in the same order and as often, as the plain text that it reads as.

    Raises:
        DataError: if no answer is structured, or too few remain to hold any out.
    """
    rejected = Rejections("the answers") if rejected is None else rejected
    given = [example for example in map(_with_tree, answers, range(1, 1 + len(answers))) if example.tree.text.strip()]
    kept = _kept(given, selection)
    trees = _with_features(kept, tokenizer, control_ids, chat_template_kwargs, rejected)
    fitting = [item for item in trees if len(item[1]) <= max_length]
    logger.info(
        "of %d answers (chats repaired: %d) the filters keep %d and the template %d; %d of these have at most %d tokens",
        len(given), len({example.record for example in given if example.repairs}), len(kept), len(trees), len(fitting),
        max_length,
    )  # fmt: skip
    draw = random.Random(seed)
    chosen = _drawn(fitting, selection, draw)
    if _held_out_count(chosen, selection) >= len(chosen):
        raise DataError(f"{len(chosen)} answers of at most {max_length} tokens are too few to hold some out; give more")
    if sequential:
        texts = [replace(example, tree=TextThread((example.tree.text,))) for example, _ in chosen]
        rows = [_features(example, tokenizer, control_ids, chat_template_kwargs) for example in texts]
        chosen = [(example, row) for (example, _), row in zip(chosen, rows, strict=True)]
    return _parted(chosen, len(fitting), selection, draw)


def _kept(given: Sequence[ChatAnswer], selection: Selection) -> list[ChatAnswer]:
    kept = [example for example in given if is_selected(example.tree, selection)]
    if not any(example.tree.is_structured for example in kept):
        raise DataError(
            f"none of the {len(given)} answers has a structure to learn from, those aside that repeat themselves, fork too "
            "often or gain too little by it; give answers with lists"
        )
    return kept


def _held_out_count(chosen: Sequence[_Tree], selection: Selection) -> int:
    return max(1, round(selection.held_out * len(chosen)))


def _parted(chosen: Sequence[_Tree], among: int, selection: Selection, draw: random.Random) -> Mixture:
    """Hold some answers out of those ``chosen`` among so many, and add copies without forks to the others."""
    keys = [prompt_key(example.before) for example, _ in chosen]
    aside = set(held_out_places(keys, _held_out_count(chosen, selection)))
    structured = sum(example.tree.is_structured for example, _ in chosen)
    logger.info(
        "%d answers that fork and %d others are drawn of %d, and %d of all are held out",
        structured, len(chosen) - structured, among, len(aside),
    )  # fmt: skip
    rest = [item for place, item in enumerate(chosen) if place not in aside]
    forked = [features for example, features in rest if example.tree.is_structured]
    again = draw.sample(forked, round(selection.unforked_share * len(forked)))
    train = [features for _, features in rest] + [unforked(tree) for tree in again]
    draw.shuffle(train)
    held_out = [features for place, (_, features) in enumerate(chosen) if place in aside]
    return Mixture(train, held_out, max(example.tree.depth for example, _ in chosen))


def _drawn(trees: Sequence[_Tree], selection: Selection, draw: random.Random) -> list[_Tree]:
    """Return the structured ones of ``trees``, and so many others that the former have their share."""
    structured, whole = ([item for item in trees if item[0].tree.is_structured is forks] for forks in (True, False))
    wanted = round(len(structured) * (1 - selection.structured_share) / selection.structured_share)
    chosen = structured + draw.sample(whole, min(wanted, len(whole)))
    draw.shuffle(chosen)
    return chosen


def _with_tree(answer: TextAnswer | ChatAnswer, number: int) -> ChatAnswer:
    if isinstance(answer, ChatAnswer):
        return answer
    return ChatAnswer((Message(role="user", content=answer.prompt),), extract(answer.response), record=number)


def _with_features(
    examples: Sequence[ChatAnswer],
    tokenizer: PreTrainedTokenizerBase,
    control_ids: tuple[int, int],
    chat_template_kwargs: Mapping[str, object] | None,
    rejected: Rejections,
) -> list[_Tree]:
    """Return the examples with their features; what the template refuses, or leaves out in part, goes to ``rejected``.

    A warning tells of these.

    Raises:
        DataError: if nothing is left.
    """
    trees: list[_Tree] = []
    for example in examples:
        try:
            trees.append((example, _features(example, tokenizer, control_ids, chat_template_kwargs)))
        except DataError as error:
            rejected.add([Rejected.by(error, example.record, {"messages": example.before})])
    if not trees:
        raise rejected.nothing_left("chats that the tokenizer's chat template takes")
    if rejected:
        logger.warning("%s", rejected)
    return trees


def _features(
    example: ChatAnswer,
    tokenizer: PreTrainedTokenizerBase,
    control_ids: tuple[int, int],
    chat_template_kwargs: Mapping[str, object] | None,
) -> TreeFeatures:
    prompt, eos_id = _prompt(example, tokenizer, chat_template_kwargs), int(tokenizer.eos_token_id)
    return tree_features(prompt, example.tree, tokenizer, *control_ids, eos_id=eos_id)


def _prompt(
    example: ChatAnswer, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, object] | None
) -> list[int]:
    tools = {"tools": list(example.tools)} if example.tools else {}
    variables = {**(chat_template_kwargs or {}), **tools}
    check_written(tokenizer, example.before, chat_template_kwargs=variables)
    return encode_chat(tokenizer, example.before, chat_template_kwargs=variables)
