"""How long each thread's draft should be: as long as its tokens are worth the wider step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_apar.errors import ConfigurationError
from hf_apar.tree import Thread

SCHEDULES = (None, "constant", "heuristic")

_MEMORY = 0.97  # how much of what was learnt a step leaves
_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0  # acceptance before anything is known
_SHARED_WEIGHT = 6.0  # how many tokens of its own outweigh what a thread's row has learnt


@dataclass
class Acceptance:
    """Draft tokens that were judged, and kept, the older ones counting less."""

    judged: float = 0.0
    kept: float = 0.0

    def add(self, judged: int, kept: int) -> None:
        self.judged, self.kept = _MEMORY * self.judged + judged, _MEMORY * self.kept + kept

    def rate(self, prior: float, weight: float) -> float:
        """Return the share kept, ``prior`` counting as so many tokens."""
        return (self.kept + prior * weight) / (self.judged + weight)


class DraftLengths:
    """Chooses the lengths of the drafts of all live threads together.

    A thread's next draft token is kept if all before it are: with the share ``a`` kept so far it is worth ``a ** place``
    tokens. Tokens are added, the worthiest first, while the tokens a second that are expected rise.

    Args:
        longest: bound of any draft.
        schedule: ``None`` for the above, ``"constant"`` for ``longest`` always, ``"heuristic"`` for transformers' rule by
            thread: two more if all of a draft was kept, else one less.
        step_seconds: time of a step by its number of tokens.
        draft_seconds: time that drafts of a length take to make for a number of threads.

    Raises:
        ConfigurationError: for another schedule.
    """

    def __init__(
        self,
        longest: int,
        schedule: str | None,
        step_seconds: Callable[[int], float],
        draft_seconds: Callable[[int, int], float],
    ) -> None:
        if schedule not in SCHEDULES:
            raise ConfigurationError(
                f"num_assistant_tokens_schedule is {schedule!r}; apar knows 'constant', 'heuristic' and None, which chooses "
                "the lengths by what pays"
            )
        self.longest, self.schedule = longest, schedule
        self.step_seconds, self.draft_seconds = step_seconds, draft_seconds
        self.shared = Acceptance()
        self.threads: dict[tuple[int, int], Acceptance] = {}
        self.heuristic: dict[tuple[int, int], int] = {}

    def limits(self, rows: Sequence[Sequence[Thread]]) -> list[list[int]]:
        """Return the longest draft wanted for each of the live threads of each row."""
        if not self.longest:
            return [[0] * len(threads) for threads in rows]
        keys = [[(number, thread.index) for thread in threads] for number, threads in enumerate(rows)]
        if self.schedule == "constant":
            return [[self.longest] * len(threads) for threads in rows]
        if self.schedule == "heuristic":
            return [[self.heuristic.get(key, self.longest) for key in row] for row in keys]
        best = self._best([key for row in keys for key in row])
        return [[best[key] for key in row] for row in keys]

    def judged(self, number: int, thread: Thread, proposed: int, accepted: int) -> None:
        """Learn that of a draft of ``proposed`` tokens for ``thread`` of row ``number`` the first ``accepted`` were kept."""
        key = (number, thread.index)
        seen = min(accepted + 1, proposed)  # those after the first wrong one were not judged
        self.shared.add(seen, accepted)
        self.threads.setdefault(key, Acceptance()).add(seen, accepted)
        if proposed:
            length = self.heuristic.get(key, self.longest)
            self.heuristic[key] = length + 2 if accepted == proposed else max(1, length - 1)

    def _best(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
        shared = self.shared.rate(_PRIOR, _PRIOR_WEIGHT)
        rates = [self.threads.setdefault(key, Acceptance()).rate(shared, _SHARED_WEIGHT) for key in keys]
        width = len(keys)
        best, lengths = width / self.step_seconds(width) if width else 0.0, [0] * width
        for longest in range(1, self.longest + 1):
            worth = sorted(
                ((rate**place, index) for index, rate in enumerate(rates) for place in range(1, longest + 1)), reverse=True
            )
            tokens, chosen, making = float(width), [0] * width, self.draft_seconds(longest, width)
            for added, (gain, index) in enumerate(worth, start=1):
                tokens += gain
                chosen[index] += 1
                speed = tokens / (self.step_seconds(width + added) + making)
                if speed > best:
                    best, lengths = speed, list(chosen)
        return dict(zip(keys, lengths, strict=True))
