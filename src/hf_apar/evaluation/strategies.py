"""Against structure that is wrong: a threshold for forks, and guards against threads that run away; off unless asked for."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.written import PathProcessor, Signs, Written, force, withhold


class Strategy(PathProcessor):
    """One of :data:`STRATEGIES`, and the value that it takes.

    Raises:
        ConfigurationError: for another name.
    """

    def __init__(self, name: str, value: float, signs: Signs, prompt_length: int) -> None:
        if name not in STRATEGIES:
            raise ConfigurationError(f"there is no strategy {name!r}; take one of {', '.join(STRATEGIES)}")
        super().__init__(signs, prompt_length)
        self.name, self.value = name, value
        self.cut: set[tuple[int, ...]] = set()  # prompts of answers of which a thread was made to end
        # by parent and the beginning of a run: its last token, and the child that wrote it first
        self.told: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, tuple[int, ...]]] = {}

    def edit(self, written: Written, scores: Tensor) -> None:
        STRATEGIES[self.name].edit(self, written, scores)

    def end(self, written: Written, scores: Tensor) -> None:
        """Let the thread end here, and note that it did not by itself."""
        force(scores, self.signs.ends[0])
        self.cut.add(written.prompt)


def _threshold(strategy: Strategy, written: Written, scores: Tensor) -> None:
    fork = strategy.signs.fork
    if float(scores.softmax(dim=-1)[fork]) < strategy.value:
        withhold(scores, [fork])


def _most_tokens(strategy: Strategy, written: Written, scores: Tensor) -> None:
    if len(written.own) >= strategy.value:
        strategy.end(written, scores)


def _most_forks(strategy: Strategy, written: Written, scores: Tensor) -> None:
    if written.own.count(strategy.signs.fork) >= strategy.value:
        withhold(scores, [strategy.signs.fork])


def _loops(strategy: Strategy, written: Written, scores: Tensor) -> None:
    length = int(strategy.value)
    runs = Counter(written.own[place : place + length] for place in range(len(written.own) - length + 1))
    if runs and runs[written.own[-length:]] > 1:
        strategy.end(written, scores)


def _siblings(strategy: Strategy, written: Written, scores: Tensor) -> None:
    length, own = int(strategy.value), written.own
    if written.is_root:
        return
    if len(own) >= length:
        strategy.told.setdefault((written.parent, own[-length:-1]), {}).setdefault(own[-1], written.given)
    begun = own[max(len(own) - length + 1, 0) :]
    firsts = strategy.told.get((written.parent, begun), {})
    withhold(scores, [token for token, first in firsts.items() if first != written.given])


@dataclass(frozen=True)
class _Guard:
    says: str
    edit: Callable[[Strategy, Written, Tensor], None]


STRATEGIES: Mapping[str, _Guard] = {
    "threshold": _Guard("a fork only where its probability is at least so much", _threshold),
    "most-tokens": _Guard("a thread ends once it has written so many tokens, forks included", _most_tokens),
    "most-forks": _Guard("a thread forks at most so often", _most_forks),
    "siblings": _Guard(
        "a thread may not write a run of so many tokens that a sibling has; it alone looks beyond the path, so what comes "
        "of it depends on who is first: on max_threads, and on drafts, whose guesses count as written",
        _siblings,
    ),
    "loops": _Guard("a thread ends once it has written a run of so many tokens twice", _loops),
}
"""By name: what it does with its value."""
