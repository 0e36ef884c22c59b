"""The training mixture: answers as trees, structured and whole ones in a fixed proportion, some held out."""

import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from hf_apar.text import encode_answer

logger = logging.getLogger(__name__)

_BOLD_ITEM = re.compile(r"^ {0,3}(?:[-*+]|\d{1,3}[.)])[ \t]+(?:\*\*|__)", re.MULTILINE)


def packed_rows(
    answers: Path,
    tokenizer: PreTrainedTokenizerBase,
    control_ids: tuple[int, int],
    *,
    max_length: int = 1024,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> list[dict[str, list[int]]]:
    """Return every answer of a file as rows for :class:`~hf_apar.data.collator.DataCollatorForApar`, several to a row.

    Args:
        answers: as for :func:`read_examples`.
        control_ids: of [Fork] and [Child].
        max_length: tokens of a row; of a longer answer the last threads are left out.
        chat_template_kwargs: as for :func:`~hf_apar.chat.encode_chat`.

    Raises:
        DataError: if a record is no answer.
    """
    pairs = map(_with_tree, read_examples(answers))
    trees = [_features(*pair, tokenizer, control_ids, chat_template_kwargs) for pair in pairs]
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


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which answers are trained on, and in which proportions.

    Attributes:
        structured_share: answers that fork, among all; of the others so many are drawn.
        unforked_share: of the structured ones that are trained on, so many come once more as they read without forks
            (:func:`~hf_apar.data.features.unforked`): decoded plainly, with [Fork] banned, the model must know that a
            title's detail is followed by the next title and not by EOS.
        held_out: kept aside for the metrics.
        max_repetition: left out is what repeats more of its runs of five words, a title, or in one thread what a sibling
            says; at 1 repetition is no reason.
        max_forks: left out is what forks more often, which a model does not learn to end.
        min_ideal_ratio: left out is what forks and is less than so many times as long as its longest path, in characters,
            so that forking hardly pays.
        min_elaborated: left out is what forks where a smaller share of its threads has a second sentence: else the end is
            what is likeliest after the first.
        likeliest: of several answers to one prompt that are not left out, one is trained on: an answer that forks where
            there is one, and of these the one that the model finds likeliest a token before its tuning, so that it need
            learn few words that are not its own.

    Raises:
        DataError: if a share is out of its range.
    """

    structured_share: float = 0.67
    unforked_share: float = 0.15
    held_out: float = 0.05
    max_repetition: float = 0.1
    max_forks: int | None = None
    min_ideal_ratio: float = 1.0
    min_elaborated: float = 0.0
    likeliest: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.structured_share <= 1 or not 0 < self.held_out < 1 or not 0 <= self.unforked_share <= 1:
            raise DataError(
                f"structured_share is {self.structured_share}, held_out {self.held_out} and unforked_share "
                f"{self.unforked_share}; the first is above 0 and at most 1, the second between 0 and 1, the last one of "
                "these or between them"
            )

    def keeps(self, tree: TextThread) -> bool:
        """Is it an answer to learn from?"""
        if self._is_repetitive(tree):
            return False
        return self._pays(tree) if tree.is_structured else not _BOLD_ITEM.search(tree.text)

    def _is_repetitive(self, tree: TextThread) -> bool:
        if self.max_repetition >= 1:
            return False
        return repeated_share(tree.text) > self.max_repetition or repeats_a_title(tree) or repeats_a_sibling(tree)

    def _pays(self, tree: TextThread) -> bool:
        """Does it fork so that it is worth it?"""
        if self.max_forks is not None and tree.fork_count > self.max_forks:
            return False
        if sum(map(_goes_on, tree.children)) < self.min_elaborated * len(tree.children):
            return False
        return len(tree.text) >= self.min_ideal_ratio * tree.critical_path(len)


DEFAULT_SELECTION = Selection()


def mix(
    answers: Sequence[Answer | ChatAnswer],
    tokenizer: PreTrainedTokenizerBase,
    control_ids: tuple[int, int],
    selection: Selection = DEFAULT_SELECTION,
    *,
    max_length: int = 1024,
    seed: int = 0,
    nll: Callable[[list[int], list[int]], float] | None = None,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> Mixture:
    """Extract the trees of ``answers`` without one, and make of them what ``selection`` says.

    ``nll`` says how unlikely the model finds the ids of an answer after those of its prompt, in nats a token; it is needed
    where ``selection.likeliest`` has a choice. ``chat_template_kwargs`` are those of :func:`~hf_apar.chat.encode_chat`.

    Answers of more than ``max_length`` tokens are left out. So are those that do not fork and hold a list with bold titles:
    whether such a list forks should depend on nothing small.

    Raises:
        DataError: if no answer is structured, or too few remain to hold any out.
    """
    given = [(before, tree) for before, tree in map(_with_tree, answers) if tree.text.strip()]
    kept = [pair for pair in given if selection.keeps(pair[1])]
    if not any(tree.is_structured for _, tree in kept):
        raise DataError(
            f"none of the {len(given)} answers has a structure to learn from, those aside that repeat themselves, fork too "
            "often or gain too little by it; give answers with lists"
        )
    trees = [(pair, _features(*pair, tokenizer, control_ids, chat_template_kwargs)) for pair in kept]
    fitting = [item for item in trees if len(item[1]) <= max_length]
    if selection.likeliest:
        fitting = _likeliest(fitting, tokenizer, nll, chat_template_kwargs)
    structured, whole = ([item for item in fitting if item[0][1].is_structured is forks] for forks in (True, False))
    draw = random.Random(seed)
    wanted = round(len(structured) * (1 - selection.structured_share) / selection.structured_share)
    chosen = structured + draw.sample(whole, min(wanted, len(whole)))
    draw.shuffle(chosen)
    aside = max(1, round(selection.held_out * len(chosen)))
    if aside >= len(chosen):
        raise DataError(f"{len(chosen)} answers of at most {max_length} tokens are too few to hold some out; give more")
    logger.info(
        "%d answers, %d of them kept, %d of these fit and are chosen; %d structured and %d of %d others drawn; %d held out",
        len(given), len(kept), len(fitting), len(structured), len(chosen) - len(structured),
        len(whole), aside,
    )  # fmt: skip
    features = [item for _, item in chosen]
    forked = [features for (_, tree), features in chosen[aside:] if tree.is_structured]
    again = draw.sample(forked, round(selection.unforked_share * len(forked)))
    train = features[aside:] + [unforked(tree, *control_ids) for tree in again]
    draw.shuffle(train)
    return Mixture(train, features[:aside], max(tree.depth for (_, tree), _ in chosen))


_Pair = tuple[Sequence[Message], TextThread]  # the chat before an answer, and its tree


def _likeliest(
    trees: Sequence[tuple[_Pair, TreeFeatures]],
    tokenizer: PreTrainedTokenizerBase,
    nll: Callable[[list[int], list[int]], float] | None,
    chat_template_kwargs: Mapping[str, object] | None,
) -> list[tuple[_Pair, TreeFeatures]]:
    """Return one answer to each prompt, in the order of the first of each: the least unlikely of those that fork."""

    def unlikely(item: tuple[_Pair, TreeFeatures]) -> float:
        if nll is None:
            raise DataError("Selection.likeliest needs nll: a model that says how likely an answer is")
        (before, tree), _ = item
        prompt = encode_chat(tokenizer, before, chat_template_kwargs=chat_template_kwargs)
        return nll(prompt, encode_answer(tokenizer, prompt, tree.text))

    of_prompt: dict[str, list[tuple[_Pair, TreeFeatures]]] = {}
    for item in trees:
        of_prompt.setdefault(json.dumps(item[0][0]), []).append(item)
    chosen = []
    for same in of_prompt.values():
        candidates = [item for item in same if item[0][1].is_structured] or same
        chosen.append(min(candidates, key=unlikely) if len(candidates) > 1 else candidates[0])
    return chosen


def _goes_on(child: TextThread) -> bool:
    """Does it go on after its first sentence?"""
    text = child.text.strip()
    end = first_sentence_end(text)
    return end is not None and bool(text[end:].strip())


def _with_tree(answer: Answer | ChatAnswer) -> _Pair:
    if isinstance(answer, ChatAnswer):
        return answer.before, answer.tree
    return [{"role": "user", "content": answer.prompt}], extract(answer.response)


def _features(
    before: Sequence[Message],
    tree: TextThread,
    tokenizer: PreTrainedTokenizerBase,
    control_ids: tuple[int, int],
    chat_template_kwargs: Mapping[str, object] | None,
) -> TreeFeatures:
    prompt = encode_chat(tokenizer, before, chat_template_kwargs=chat_template_kwargs)
    return tree_features(prompt, tree, tokenizer, *control_ids, eos_id=int(tokenizer.eos_token_id))
