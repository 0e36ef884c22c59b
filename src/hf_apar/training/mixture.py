"""The training mixture: answers as trees, structured and whole ones in a fixed proportion, some held out."""

import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_apar.chat import encode_chat
from hf_apar.data.collator import pack
from hf_apar.data.distill import Answer
from hf_apar.data.features import TreeFeatures, tree_features, truncate, unforked
from hf_apar.data.markdown import extract
from hf_apar.data.records import ChatAnswer, Message, chat_answers, open_records
from hf_apar.data.repetition import repeated_share, repeats_a_sibling, repeats_a_title
from hf_apar.data.sentences import first_sentence_end
from hf_apar.data.text_tree import TextThread
from hf_apar.errors import DataError

logger = logging.getLogger(__name__)

_BOLD_ITEM = re.compile(r"^ {0,3}(?:[-*+]|\d{1,3}[.)])[ \t]+(?:\*\*|__)", re.MULTILINE)


def packed_rows(
    answers: Path, tokenizer: PreTrainedTokenizerBase, control_ids: tuple[int, int], *, max_length: int = 1024
) -> list[dict[str, list[int]]]:
    """Return every answer of a file as rows for :class:`~hf_apar.data.collator.DataCollatorForApar`, several to a row.

    Args:
        answers: as for :func:`read_examples`.
        control_ids: of [Fork] and [Child].
        max_length: tokens of a row; of a longer answer the last threads are left out.

    Raises:
        DataError: if a record is no answer.
    """
    trees = [_features(*_with_tree(answer), tokenizer, control_ids) for answer in read_examples(answers)]
    return [row.to_dict() for row in pack([truncate(tree, max_length, control_ids[1]) for tree in trees], max_length)]


@dataclass(frozen=True)
class Mixture:
    """Trees of tokens to train on and to judge by, and the deepest thread among them."""

    train: list[TreeFeatures]
    held_out: list[TreeFeatures]
    max_depth: int


def read_examples(path: Path) -> list[Answer | ChatAnswer]:
    """Read the answers that :func:`~hf_apar.data.distill.distill` wrote, or the chats and trees of ``hf-apar extract``.

    Raises:
        DataError: if a record is neither.
    """
    return [example for number, row in open_records(path).rows for example in _examples(path, number, row)]


def _examples(path: Path, number: int, row: object) -> Iterator[Answer | ChatAnswer]:
    try:
        record = json.loads(row) if isinstance(row, bytes) else row
        if isinstance(record, Mapping) and "messages" in record:
            yield from chat_answers(record)
        elif isinstance(record, Mapping):
            yield Answer(record["prompt"], record["response"])
        else:
            raise DataError("it is no object")
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{path}, record {number}: {error}; wanted a prompt and a response, or what `hf-apar extract` writes"
        ) from error


def mix(
    answers: Sequence[Answer | ChatAnswer],
    tokenizer: PreTrainedTokenizerBase,
    control_ids: tuple[int, int],
    *,
    structured_share: float = 0.67,
    unforked_share: float = 0.0,
    held_out: float = 0.05,
    max_length: int = 1024,
    max_repetition: float = 0.1,
    max_forks: int | None = None,
    min_ideal_ratio: float = 1.0,
    min_elaborated: float = 0.0,
    seed: int = 0,
) -> Mixture:
    """Extract the trees of ``answers`` without one; draw of the unstructured ones until ``structured_share`` are structured.

    Of the structured answers that are trained on, ``unforked_share`` come once more, as they read without forks
    (:func:`~hf_apar.data.features.unforked`): decoded plainly, with [Fork] banned, the model must know that a title's detail
    is followed by the next title and not by EOS.

    All structured answers are kept but for those left out: of more than ``max_length`` tokens; that repeat more than
    ``max_repetition`` of their runs of five words, a title, or in one thread what a sibling says (with ``max_repetition=1``
    repetition is no reason); that fork more than ``max_forks`` times, which a model does not learn to end; whose text is
    less than ``min_ideal_ratio`` times as long as its longest path, in characters, so that forking hardly pays; of whose
    threads a smaller share than ``min_elaborated`` has a second sentence: else the end is what is likeliest after the first.
    Of the others, those are left out that hold a list with bold titles: whether such a list forks should depend on nothing
    small.

    Raises:
        DataError: if a share is out of its range, no answer is structured, or too few remain to hold any out.
    """
    if not 0 < structured_share <= 1 or not 0 < held_out < 1 or not 0 <= unforked_share <= 1:
        raise DataError(
            f"structured_share is {structured_share}, held_out {held_out} and unforked_share {unforked_share}; the first is "
            "above 0 and at most 1, the second between 0 and 1, the third one of these or between them"
        )
    given = [(before, tree) for before, tree in map(_with_tree, answers) if tree.text.strip()]
    pairs = [(before, tree) for before, tree in given if max_repetition >= 1 or not _repetitive(tree, max_repetition)]
    forking = [pair for pair in pairs if pair[1].is_structured]
    structured = [pair for pair in forking if _pays(pair[1], max_forks, min_ideal_ratio, min_elaborated)]
    whole = [pair for pair in pairs if not pair[1].is_structured and not _BOLD_ITEM.search(pair[1].text)]
    if not structured:
        raise DataError(
            f"none of the {len(given)} answers has a structure to learn from, those aside that repeat themselves, fork too "
            "often or gain too little by it; give answers with lists"
        )
    draw = random.Random(seed)
    wanted = round(len(structured) * (1 - structured_share) / structured_share)
    chosen = structured + draw.sample(whole, min(wanted, len(whole)))
    draw.shuffle(chosen)
    trees = [(pair, _features(*pair, tokenizer, control_ids)) for pair in chosen]
    fitting = [(pair, features) for pair, features in trees if len(features) <= max_length]
    aside = max(1, round(held_out * len(fitting)))
    if aside >= len(fitting):
        raise DataError(f"{len(fitting)} answers of at most {max_length} tokens are too few to hold some out; give more")
    logger.info(
        "%d answers, %d of them repetitive; %d of %d structured kept, %d of %d others drawn; %d too long; %d held out",
        len(given), len(given) - len(pairs), len(structured), len(forking), len(chosen) - len(structured), len(whole),
        len(trees) - len(fitting), aside,
    )  # fmt: skip
    features = [item for _, item in fitting]
    forked = [features for (_, tree), features in fitting[aside:] if tree.is_structured]
    again = draw.sample(forked, round(unforked_share * len(forked)))
    train = features[aside:] + [unforked(tree, *control_ids) for tree in again]
    draw.shuffle(train)
    return Mixture(train, features[:aside], max(tree.depth for (_, tree), _ in fitting))


def _repetitive(tree: TextThread, most: float) -> bool:
    return repeated_share(tree.text) > most or repeats_a_title(tree) or repeats_a_sibling(tree)


def _pays(tree: TextThread, max_forks: int | None, min_ideal_ratio: float, min_elaborated: float) -> bool:
    if max_forks is not None and tree.fork_count > max_forks:
        return False
    if sum(map(_goes_on, tree.children)) < min_elaborated * len(tree.children):
        return False
    return len(tree.text) >= min_ideal_ratio * tree.critical_path(len)


def _goes_on(child: TextThread) -> bool:
    """Does it go on after its first sentence?"""
    text = child.text.strip()
    end = first_sentence_end(text)
    return end is not None and bool(text[end:].strip())


def _with_tree(answer: Answer | ChatAnswer) -> tuple[Sequence[Message], TextThread]:
    if isinstance(answer, ChatAnswer):
        return answer.before, answer.tree
    return [{"role": "user", "content": answer.prompt}], extract(answer.response)


def _features(
    before: Sequence[Message], tree: TextThread, tokenizer: PreTrainedTokenizerBase, control_ids: tuple[int, int]
) -> TreeFeatures:
    return tree_features(encode_chat(tokenizer, before), tree, tokenizer, *control_ids, eos_id=int(tokenizer.eos_token_id))
