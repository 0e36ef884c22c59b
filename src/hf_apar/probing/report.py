"""What the answers of a sample come to: how many would fork, what that could save, and why the others stay whole."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal

from hf_apar.config import MAX_THREADS
from hf_apar.data.extraction.repetition import repeated_share
from hf_apar.data.extraction.rules import NO_STRUCTURE, Rule
from hf_apar.evaluation.metrics import LOOP
from hf_apar.evaluation.statistics import Interval, bootstrap, mean, ratio, wilson
from hf_apar.evaluation.suites import SUITES
from hf_apar.probing.probed import Probed
from hf_apar.probing.step_times import StepTimes

Unit = Literal["tokens", "words"]
OWN = ("own", *SUITES)
"""The sources of prompts that come with the package."""
EXAMPLES = 3
_FEW = 20  # answers below which an interval of the bootstrap is too narrow


@dataclass(frozen=True)
class Estimate:
    """A figure of the sample: its name, what it says, and its value with an interval of 95 %."""

    name: str
    says: str
    value: Interval
    is_share: bool = False

    def __str__(self) -> str:
        """Return the value in a few letters, without the interval.

        >>> str(Estimate("forking", "", Interval(0.3, 0.431, 0.5), is_share=True)), str(Estimate("", "", Interval(1, 2, 3)))
        ('43 %', '2.00')
        """
        return self._shown(self.value.value)

    @property
    def interval(self) -> str:
        """The interval in a few letters."""
        return f"{self._shown(self.value.low)} to {self._shown(self.value.high)}"

    def _shown(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.is_share else f"{value:.2f}"


@dataclass(frozen=True)
class Whole:
    """A reason why answers stay whole, how many do by it, and one of them."""

    rule: Rule
    count: int
    example: Probed


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What a sample of answers comes to.

    Attributes:
        answers: one at least.
        unit: in which lengths are counted.
        source: the file or suite of the prompts or answers.
        model: who answered; ``None`` where the answers were there.
        made_with: all else that the figures depend on.
        times: of steps on this machine, where they were measured.
        left_out: why prompts have no answer, and how many.
    """

    answers: Sequence[Probed]
    unit: Unit
    source: str
    model: str | None = None
    made_with: Mapping[str, object] = field(default_factory=dict)
    times: StepTimes | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def forking(self) -> list[Probed]:
        """The answers that come in parts."""
        return [one for one in self.answers if one.forks]

    @cached_property
    def figures(self) -> list[Estimate]:
        """What is estimated; sums over the sample, so that long answers weigh as much as they take.

        Intervals are of the answers that were drawn: Wilson's for the share, else the bootstrap's over answers.
        """
        return list(self._figures())

    def _figures(self) -> Iterator[Estimate]:
        share = wilson(len(self.forking), len(self.answers))
        yield Estimate("forking", "of the answers come in parts that would fork", share, is_share=True)
        if forking := self.forking:
            counts = [len(one.spans) for one in forking]
            threads = bootstrap(counts, mean)
            yield Estimate("threads", "threads an answer that forks, the main one included", threads)
            ideal = ratio([one.total for one in forking], [max(one.path, 1) for one in forking])
            yield Estimate("ideal_ratio", f"{self.unit} of such answers over those on their longest paths", ideal)
        steps = ratio([one.total for one in self.answers], [one.steps for one in self.answers])
        says = f"{self.unit} a step over all answers, whole ones too; plain decoding has 1 at most"
        yield Estimate("tokens_per_step", says, steps)
        if self.times is not None:
            plain = [self.times.seconds(one.total + 1, one.total + 1) for one in self.answers]
            forked = [self.times.seconds(one.steps, one.sampled) for one in self.answers]
            saved = [long - short for long, short in zip(plain, forked, strict=True)]
            before, less = sum(plain) / len(plain), sum(saved) / len(saved)
            says = f"of the time of writing saved here: {before:.2f} s an answer become {before - less:.2f}"
            yield Estimate("time_saved", says, ratio(saved, plain), is_share=True)

    @cached_property
    def whole(self) -> list[Whole]:
        """Why answers stay whole, the most frequent reason first."""
        by_rule: dict[Rule, list[Probed]] = {}
        for one in self.answers:
            if not one.forks:
                by_rule.setdefault(one.found.refused_by or NO_STRUCTURE, []).append(one)
        found = [Whole(rule, len(those), those[0]) for rule, those in by_rule.items()]
        return sorted(found, key=lambda reason: -reason.count)

    @cached_property
    def kept(self) -> list[tuple[str, int]]:
        """Why parts of answers stay in their parents, and how many."""
        return Counter(rule.why for one in self.answers for rule in one.found.kept_by).most_common()

    @cached_property
    def examples(self) -> list[Probed]:
        """Answers that fork, spread evenly from those that gain least to those that gain most."""
        ranked = sorted(self.forking, key=lambda one: one.total / one.steps)
        if len(ranked) <= EXAMPLES:
            return ranked
        return [ranked[(2 * number + 1) * len(ranked) // (2 * EXAMPLES)] for number in range(EXAMPLES)]

    @property
    def typical(self) -> Probed:
        """Of the answers that fork, the one whose length is closest to their mean."""
        length = sum(one.total for one in self.forking) / len(self.forking)
        return min(self.forking, key=lambda one: abs(one.total - length))

    @property
    def usual_threads(self) -> int:
        """The mean of the threads of the answers that fork, no more than decoding lets live at once."""
        return min(round(sum(len(one.spans) for one in self.forking) / len(self.forking)), MAX_THREADS)

    @cached_property
    def leaves_out(self) -> list[str]:
        """What the figures do not say, in sentences."""
        return list(self._leaves_out())

    def _leaves_out(self) -> Iterator[str]:
        yield (
            "A tuned model forks where it was taught to, less often or more often than these rules find parts, and in other "
            "words: this is what threads could save on such answers, no forecast of what a training reaches."
        )
        if self.source in OWN:
            yield "The prompts are the package's own mixture; give a file of those that your users send."
        if self.times is not None:
            one, many = (f"{1000 * seconds:.1f} ms" for seconds in (self.times.one, self.times.many))
            yield (
                f"Step times are of one answer at a time on this {self.times.device}, after {self.times.context} tokens: "
                f"{one} for one token, {many} for {self.times.threads}. The pass over the prompt, which both ways need, is "
                "left out, and a machine that many requests fill gains less."
            )
        if self.unit == "words":
            yield "Lengths are counted in words, a fork or an end as one: no tokenizer was at hand."
        if cut := sum(not one.answer.ended for one in self.answers):
            yield (
                f"{cut} of {len(self.answers)} answers were cut at the limit of tokens and count as far as they go; give "
                "--max-new-tokens more to see their ends."
            )
        if loops := sum(repeated_share(one.answer.response) > LOOP for one in self.answers):
            yield f"{loops} of {len(self.answers)} answers repeat themselves, and what they repeat counts as any other part."
        if empty := sum(not one.answer.response.strip() for one in self.answers):
            yield f"{empty} of {len(self.answers)} answers are empty."
        if 0 < len(self.forking) < _FEW:
            yield f"Only {len(self.forking)} answers fork: their intervals are too narrow; draw a larger --sample."
        for reason, count in Counter(self.left_out).most_common(3):
            yield f"{count} of the prompts have no answer: {reason}"

    @property
    def title(self) -> str:
        """Whose answers to what they are."""
        asked = f"{len(self.answers)} prompts of {self.source}"
        return f"Answers to {asked}" if self.model is None else f"{self.model} answers {asked}"

    @property
    def next_step(self) -> tuple[str, str]:
        """What to do now, and the command for it."""
        if not self.forking:
            return "No answer comes in parts, so that threads would save nothing; probe other prompts", "hf-apar probe FILE"
        if self.model is None:
            return "Teach the model that wrote them", f"hf-apar train {shlex.quote(self.source)} adapter --model FOLDER"
        local = "FOLDER" if "url" in self.made_with else shlex.quote(self.model)
        prompts = "" if self.source in OWN else f" --prompts {shlex.quote(self.source)}"
        return "Teach it", f"hf-apar recipe --model {local}{prompts} --output tuned"

    def to_dict(self) -> dict[str, object]:
        """Return all of it, for JSON."""
        whole = [
            {"rule": one.rule.name, "why": one.rule.why, "count": one.count, "example": asdict(one.example.answer)}
            for one in self.whole
        ]
        examples = [
            asdict(one.answer) | {"tree": one.found.tree.to_json(), "spans": [asdict(span) for span in one.spans]}
            for one in self.examples
        ]
        return {
            "source": self.source, "model": self.model, "made_with": dict(self.made_with), "unit": self.unit,
            "answers": len(self.answers), "forking": len(self.forking),
            "figures": {one.name: asdict(one.value) | {"says": one.says} for one in self.figures},
            "step_times": None if self.times is None else asdict(self.times), "whole": whole, "parts_kept": dict(self.kept),
            "examples": examples, "leaves_out": self.leaves_out, "next": self.next_step[1],
            "each": [one.to_dict() for one in self.answers],
        }  # fmt: skip
