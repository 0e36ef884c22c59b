"""What a storm is, its run, and its record: JSON lines that a later run goes on from."""

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Scenario = dict[str, Any]  # what JSON can hold: keyword arguments of a check

SHRINKING = 300  # scenarios at most, and
SECONDS = 30.0  # at most, that the search for a smaller one may take


@dataclass(frozen=True)
class Storm:
    """Scenarios of one kind.

    Attributes:
        draw: gives a scenario.
        check: takes a scenario as keyword arguments and raises whatever it likes where the package fails.
        share: of the time, beside the other storms.
        every: scenarios that are to be tried in any case, before those that are drawn.
        parts: how many things a scenario tries.
    """

    name: str
    draw: Callable[[random.Random], Scenario]
    check: Callable[..., None]
    share: float = 1.0
    every: tuple[Scenario, ...] = ()
    parts: Callable[[Scenario], int] = lambda _: 1

    def scenario(self, seed: int) -> Scenario:
        """Return the scenario of a seed, the same ever after."""
        return self.every[seed] if seed < len(self.every) else self.draw(random.Random(f"{self.name} {seed}"))

    def failure(self, scenario: Scenario) -> str | None:
        """Return in words what fails, ``None`` if nothing does."""
        try:
            self.check(**scenario)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a Rust panic is no Exception
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None


@dataclass
class Tally:
    """What a storm has tried so far: ``failures`` are those of a kind each, as small as they were made."""

    next_seed: int = 0
    tried: int = 0
    parts: int = 0
    failed: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> "Tally":
        """Add up the lines of ``file``; one that a killed process left unfinished counts nothing."""
        tally = cls()
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            tally.next_seed = max(tally.next_seed, record["until"])
            tally.tried += record["tried"]
            tally.parts += record.get("parts", record["tried"])
            tally.failed += record["failed"]
            tally.failures += record["failures"]
        return tally


def run(storm: Storm, folder: Path, seconds: float, say: Callable[[str], None]) -> Tally:
    """Try scenarios for so long, from the first seed that ``folder`` does not know, and write down what came of them."""
    file = folder / f"{storm.name}.jsonl"
    known = Tally.read(file)
    kinds = {_kind(one["error"]) for one in known.failures}
    end, seed = time.monotonic() + seconds, known.next_seed
    while time.monotonic() < end:
        until = min(end, time.monotonic() + 10)
        record: dict[str, Any] = {"since": seed, "tried": 0, "parts": 0, "failed": 0, "failures": []}
        while time.monotonic() < until:
            scenario = storm.scenario(seed)
            error = storm.failure(scenario)
            record["tried"] += 1
            record["parts"] += storm.parts(scenario)
            if error is not None:
                record["failed"] += 1
                if _kind(error) not in kinds:
                    kinds.add(_kind(error))
                    found = {"seed": seed, **_smallest(storm, scenario, error)}
                    record["failures"].append(found)
                    say(_as_test(storm, found))
            seed += 1
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record | {"until": seed}) + "\n")
    return Tally.read(file)


def mended(storm: Storm, tally: Tally) -> int:
    """Return how many of the failures that were written down fail no more."""
    return sum(storm.failure(one["scenario"]) is None for one in tally.failures)


def _kind(error: str) -> str:
    return re.sub(r"\d+|'[^']*'?|\"[^\"]*\"?", "", error[:100])


def _as_test(storm: Storm, found: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in found["scenario"].items())
    return (
        f"\nseed {found['seed']} of the storm {storm.name}: {found['error']}\n\n"
        f"def test_storm_{storm.name}_{found['seed']}():\n    {storm.check.__module__}.{storm.check.__name__}({arguments})\n"
    )


def _smallest(storm: Storm, scenario: Scenario, error: str) -> dict[str, Any]:
    """Return the smallest scenario found that fails in the same way, and how it fails."""
    left, end, kind = SHRINKING, time.monotonic() + SECONDS, _kind(error)
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(scenario):
            if left == 0 or time.monotonic() > end:
                break
            left -= 1
            other = storm.failure(candidate)
            if other is not None and _kind(other) == kind:
                scenario, error, smaller = candidate, other, True
                break
    return {"error": error, "scenario": scenario}


def _smaller(value: Any) -> Iterator[Any]:
    """Yield values that are simpler than ``value``, the simplest first."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from ({**value, name: other} for other in _smaller(one))
    elif isinstance(value, list | str):
        empty = value[:0]
        if value:
            yield empty
        for size in (len(value) // 2, len(value) // 4, 1):
            for start in range(0, len(value), size) if 0 < size < len(value) else ():
                yield value[:start] + value[start + size :]
        if isinstance(value, list):
            for place, one in enumerate(value):
                yield from ([*value[:place], other, *value[place + 1 :]] for other in _smaller(one))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from (other for other in (0, 1, value // 2, value - 1) if 0 <= other < value)
    elif value is True:
        yield False
