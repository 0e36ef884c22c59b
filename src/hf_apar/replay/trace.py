"""What each thread of an answer wrote in which step, and when: all that a replay needs, without model and tokenizer."""

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from hf_apar.errors import DataError
from hf_apar.replay.validity import problem
from hf_apar.tree.threads import ParagraphTree, Thread


@dataclass(frozen=True)
class TracedThread:
    """One thread of a :class:`Trace`. A step is the number of a forward pass; -1 stands for the time before the first.

    Attributes:
        parent: index of the thread that forked it, ``None`` for the root.
        fork_position: how many of its parent's texts read before it.
        inherited: how many places its path had when it was forked; of the root, those of the prompt.
        born: the step that forked it, -1 for the root.
        ended: the step in which it ended, ``None`` if it did not.
        finish_reason: why it ended, as that of :class:`~hf_apar.Thread`.
        steps: in which step each place of its own was taken, control tokens included; none while it waits.
        places: the place in the path of each of its texts.
        texts: what each of its tokens adds to the answer's text; one that is a part of a character may add nothing.
        logprobs: the log probability of each of them, where it is known.
        accepted: which of them a draft had guessed.
    """

    parent: int | None
    fork_position: int
    inherited: int
    born: int
    ended: int | None
    finish_reason: str | None
    steps: tuple[int, ...]
    places: tuple[int, ...]
    texts: tuple[str, ...]
    logprobs: tuple[float | None, ...] | None = None
    accepted: tuple[int, ...] = ()

    def written_in(self, text: int) -> int:
        """Return the step that wrote a text."""
        return self.steps[self.places[text] - self.inherited]

    def unfinished_after(self, step: int) -> bool:
        """Does it live or wait after ``step``?"""
        return self.born <= step and (self.ended is None or self.ended > step)


@dataclass(frozen=True)
class Trace:
    """How one answer was written; :class:`Recorder` makes it, :func:`write_replay` shows it.

    Attributes:
        threads: in the order of creation.
        times: when each step was over, in seconds from the start; without a clock 1, 2, 3 ...
        question: what was asked, for the page's head.
        timed: are ``times`` seconds?
        stopped_by: where the answer was cut, as that of :class:`~hf_apar.ParagraphTree`.

    Raises:
        DataError: if this is nothing that can have happened.

    >>> root = TracedThread(None, 0, 4, -1, 2, "eos", (0, 1, 2), (4, 6), ("Oak", "."))
    >>> child = TracedThread(0, 1, 6, 1, 2, "eos", (1, 2), (7,), (": hard",))
    >>> trace = Trace((root, child), (0.5, 0.75, 1.0))
    >>> trace.text, trace.held
    ('Oak: hard.', [5, 7, 0])
    >>> Trace.from_dict(trace.to_dict()) == trace
    True
    """

    threads: tuple[TracedThread, ...]
    times: tuple[float, ...]
    question: str = ""
    timed: bool = True
    stopped_by: int | None = None

    def __post_init__(self) -> None:
        if (found := problem(self.to_dict())) is not None:
            raise DataError(f"this is no trace of an answer: {found}; record one, or give what save_traces wrote")

    @cached_property
    def tree(self) -> ParagraphTree:
        """The threads and their reading order, with the index of each text for a token."""
        threads = [
            Thread(index, one.parent, one.fork_position, 0, [], tokens=list(range(len(one.texts))))
            for index, one in enumerate(self.threads)
        ]
        return ParagraphTree(threads, self.stopped_by)

    @property
    def text(self) -> str:
        """The answer, as :meth:`ParagraphTree.text <hf_apar.ParagraphTree.text>` gives it."""
        return "".join(self.threads[index].texts[one] for index, texts in self.tree.reading_order() for one in texts)

    @cached_property
    def held(self) -> list[int]:
        """How many cache slots paths hold after each step, the prompt's included and without those of drafts."""
        return [self._held_after(step) for step in range(len(self.times))]

    def _held_after(self, step: int) -> int:
        ends = [-1] * len(self.threads)  # up to which place a path, its own or a descendant's, holds what a thread wrote
        for index, one in reversed(list(enumerate(self.threads))):
            if one.unfinished_after(step):
                ends[index] = max(ends[index], one.inherited + bisect_right(one.steps, step))
            if ends[index] >= 0 and one.parent is not None:
                ends[one.parent] = max(ends[one.parent], one.inherited)
        own = sum(end - one.inherited for one, end in zip(self.threads, ends, strict=True) if end >= 0)
        return own + (self.threads[0].inherited if ends[0] >= 0 else 0)

    def to_dict(self) -> dict[str, object]:
        """Return plain values that JSON can hold; see :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Build the trace that :meth:`to_dict` wrote down, from JSON or not.

        Raises:
            DataError: if it did not.
        """
        given = _arguments(cls, values)
        threads = given["threads"]
        if not isinstance(threads, tuple):
            raise DataError(f"the threads of a trace are {threads!r:.60}; a list of them is wanted")
        given["threads"] = tuple(TracedThread(**_arguments(TracedThread, one)) for one in threads)
        return cls(**given)


def save_traces(path: str | Path, trace: Trace, plain: Trace | None = None) -> None:
    """Write ``trace``, and that of a plain answer beside it, as JSON that :func:`load_traces` reads."""
    values = {"trace": trace.to_dict()} | ({} if plain is None else {"plain": plain.to_dict()})
    Path(path).write_text(json.dumps(values, separators=(",", ":")), encoding="utf-8")


def load_traces(path: str | Path) -> tuple[Trace, Trace | None]:
    """Return the trace in ``path``, and that of a plain answer if there is one beside it.

    Raises:
        DataError: if :func:`save_traces` did not write the file.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON in UTF-8; give a file that save_traces or --trace wrote") from error
    if not isinstance(values, dict) or "trace" not in values:
        raise DataError(f"{path} holds no trace; give a file that save_traces or --trace wrote")
    plain = values.get("plain")
    return Trace.from_dict(values["trace"]), None if plain is None else Trace.from_dict(plain)


def _arguments(kind: type[Trace] | type[TracedThread], values: object) -> dict[str, Any]:
    """Return what ``values`` gives of the fields of ``kind``, lists as tuples."""
    known = {one.name: one.default is MISSING for one in fields(kind)}
    needed = {name for name, must in known.items() if must}
    if not isinstance(values, Mapping) or not needed <= values.keys() <= known.keys():
        raise DataError(f"{values!r:.60} is no {kind.__name__}; one has {', '.join(known)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
