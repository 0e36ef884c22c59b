"""How long each thread's draft should be: as long as its tokens are worth the wider step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_apar.errors import ConfigurationError
from hf_apar.speculation.proposer import Draft
from hf_apar.tree.threads import Thread

SCHEDULES = (None, "constant", "heuristic")

_MEMORY = 0.97  # how much of what was learnt a step leaves
_PRIOR, _PRIOR_WEIGHT = 0.6, 4.0  # acceptance before anything is known
_SHARED_WEIGHT = 6.0  # how many tokens of its own outweigh what a thread's row has learnt

_STRETCH = 8  # tokens over which the slope of a step's time is taken
_REST = 8  # steps before drafts are tried again where none paid


@dataclass
class Acceptance:
    """Draft tokens that were judged, and kept, the older ones counting less."""

    judged: float = 0.0
    kept: float = 0.0

    def add(self, judged: float, kept: float) -> None:
        self.judged, self.kept = _MEMORY * self.judged + judged, _MEMORY * self.kept + kept

    def rate(self, prior: float, weight: float) -> float:
        """Return the share kept, ``prior`` counting as so many tokens."""
        return (self.kept + prior * weight) / (self.judged + weight)


class DraftLengths:
    """Chooses the lengths of the drafts of all live threads together.

    A guess is worth the chance that it is kept: as the proposer estimates it, corrected by how its estimates have done, or
    ``a ** place`` where a share ``a`` of a thread's guesses was kept so far. Of all threads' guesses the worthiest are fed,
    so many that the tokens a second that are expected are the most.

    Args:
        longest: bound of any draft.
        schedule: ``None`` for the above, ``"constant"`` for ``longest`` always, ``"heuristic"`` for transformers' rule by
            thread: two more if all of a draft was kept, else one less.
        step_seconds: time of a step by its number of tokens.
        has_estimates: do the drafts tell what their guesses are worth?
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
        has_estimates: bool = False,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ConfigurationError(
                f"num_assistant_tokens_schedule is {schedule!r}; apar knows 'constant', 'heuristic' and None, which chooses "
                "the lengths by what pays"
            )
        self.longest, self.schedule = longest, schedule
        self.has_estimates = has_estimates
        self.step_seconds, self.draft_seconds = step_seconds, draft_seconds
        self.choice_seconds = 0.0  # of one token, beside the step
        self.shared = Acceptance()
        self.estimates = Acceptance()  # "judged" sums the chances that were estimated
        self.rest = 0  # steps without drafts, since none paid
        self.threads: dict[tuple[int, int], Acceptance] = {}
        self.heuristic: dict[tuple[int, int], int] = {}

    def seconds(self, width: int) -> float:
        """Return what a step of ``width`` tokens takes, their choice included."""
        return self.step_seconds(width) + self.choice_seconds * width

    def chose(self, seconds: float, width: int) -> None:
        """Learn how long the choice after ``width`` tokens took."""
        each = seconds / width
        self.choice_seconds = min(each, 0.9 * self.choice_seconds + 0.1 * each) if self.choice_seconds else each

    def least_worth(self, width: int) -> float:
        """Return what a guess must be worth to pay beside ``width`` tokens, 0 where lengths do not follow the clock.

        It pays if it adds a larger share of a step's tokens, ``width`` at least, than of the step's time.
        """
        if self.schedule is not None or not self.longest:
            return 0.0
        now = self.seconds(width)
        return width * (self.seconds(width + _STRETCH) - now) / _STRETCH / now

    def limits(self, rows: Sequence[Sequence[Thread]]) -> list[list[int]]:
        """Return the longest draft wanted for each of the live threads of each row."""
        if not self.longest:
            return [[0] * len(threads) for threads in rows]
        keys = [[(number, thread.index) for thread in threads] for number, threads in enumerate(rows)]
        if self.schedule == "constant":
            return [[self.longest] * len(threads) for threads in rows]
        if self.schedule == "heuristic":
            return [[self.heuristic.get(key, self.longest) for key in row] for row in keys]
        if self.has_estimates:  # the drafts are trimmed when they are there
            self.rest -= self.rest > 0
            if self.rest:
                return [[0] * len(threads) for threads in rows]
            return [[self.longest] * len(threads) for threads in rows]
        best = self._best([key for row in keys for key in row])
        return [[best[key] for key in row] for row in keys]

    def trimmed(self, drafts: Sequence[Sequence[Draft]]) -> Sequence[Sequence[Draft]]:
        """Return of each draft the guesses whose estimated worth pays; as they are where there is no estimate."""
        if self.schedule is not None or not any(draft.worth for row in drafts for draft in row):
            return drafts
        trust = self.estimates.rate(1.0, _PRIOR_WEIGHT)
        found = sorted(
            (-trust * worth, place, index, number)
            for number, row in enumerate(drafts)
            for index, draft in enumerate(row)
            for place, worth in enumerate(draft.worth or ())
        )
        width = sum(map(len, drafts))
        count = self._best_count(width, [-worth for worth, *_ in found], 0.0)[0]
        self.rest = 0 if count else _REST
        kept: list[list[list[int]]] = [[[] for _ in row] for row in drafts]
        for _, place, index, number in sorted(found[:count], key=lambda one: one[1]):
            kept[number][index].append(place)
        return [
            [
                draft.keep(places if draft.worth else range(len(draft.tokens)))
                for draft, places in zip(row, many, strict=True)
            ]
            for row, many in zip(drafts, kept, strict=True)
        ]

    def judged(self, number: int, thread: Thread, draft: Draft, accepted: int) -> None:
        """Learn that of ``draft`` for ``thread`` of row ``number`` so many guesses were kept."""
        key, proposed = (number, thread.index), len(draft.tokens)
        seen = min(accepted + 1, proposed)  # of a chain: those after the first wrong one were not judged
        self.shared.add(seen, accepted)
        self.estimates.add(sum(draft.worth or (), 0.0), accepted if draft.worth else 0)
        self.threads.setdefault(key, Acceptance()).add(seen, accepted)
        if proposed:
            length = self.heuristic.get(key, self.longest)
            self.heuristic[key] = length + 2 if accepted == proposed else max(1, length - 1)

    def _best(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
        shared = self.shared.rate(_PRIOR, _PRIOR_WEIGHT)
        rates = [self.threads.setdefault(key, Acceptance()).rate(shared, _SHARED_WEIGHT) for key in keys]
        width, best, lengths = len(keys), 0.0, [0] * len(keys)
        for longest in range(1, self.longest + 1):
            worth = sorted(
                ((rate**place, index) for index, rate in enumerate(rates) for place in range(1, longest + 1)), reverse=True
            )
            count, speed = self._best_count(width, [gain for gain, _ in worth], self.draft_seconds(longest, width))
            if speed > best:
                best, lengths = speed, [0] * width
                for _, index in worth[:count]:
                    lengths[index] += 1
        return dict(zip(keys, lengths, strict=True))

    def _best_count(self, width: int, worth: Sequence[float], making: float) -> tuple[int, float]:
        """Return how many guesses, the worthiest first, give the most tokens a second, and how many these are."""
        best, count, tokens = width / self.seconds(width), 0, float(width)
        for added, gain in enumerate(worth, start=1):
            tokens += gain
            if (speed := tokens / (self.seconds(width + added) + making)) > best:
                best, count = speed, added
        return count, best
