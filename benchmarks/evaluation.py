"""Writes what ``make evaluation`` measured into docs/evaluation.md, and README's table beside the figures.

    python benchmarks/evaluation.py build/evaluation

Every sentence that draws a conclusion is made of figures and their intervals: a new run that says otherwise writes otherwise.
The figures of each part stay beside the page, so that a run of some parts rewrites these alone.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_apar.evaluation.differences import Says, pair_title, says, sentence
from hf_apar.evaluation.faults import FAULTS
from hf_apar.evaluation.figures import ALL, FEW, WORTHLESS, Figure
from hf_apar.evaluation.metrics import METRICS
from hf_apar.evaluation.preference import Comparison
from hf_apar.evaluation.statistics import Interval

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
KEPT = "evaluation"  # beside the page: what was measured, by part
DIGITS = 5  # of what is kept; the page shows three
START, END = "<!-- measured by hf-apar evaluate -->\n", "<!-- end of what was measured -->"
FOLDERS = {
    "clock": "all arms on the clock, one answer at a time",
    "suites": "what is written, in batches without a clock",
    "deeper": "nested prompts where threads may fork once more than the checkpoint says",
    "chats": "what people asked an assistant, in threads alone, and no further than what shows whether an answer forks",
    "judged": "what a judge says of threads and plain decoding, in both orders",
    "faults": "structure wrong on purpose",
}
COST = ("tokens_per_step", "seconds", "seconds_per_token", "peak_kv", "attended", "accepted")
STRUCTURE = ("forks", "forks_in_parts", "false_forks", "nested", "malformed", "empty_or_repeated", "ended")
WORDS = ("tokens", "nll", "answers_question", "relevance", "redundancy", "distinct_4", "looped", "right")
SPEED, QUALITY = ("tokens_per_step", "seconds", "seconds_per_token"), ("ended", *WORDS[1:])
HELD = ("peak_kv", "attended")
JUDGED = ("tokens_per_step", "ended", "looped", "empty_or_repeated", "nll", "redundancy", "relevance", "answers_question")
UNDER_FAULTS = ("tokens_per_step", "ended", "nll")
SETTINGS = ("dtype", "prepack", "max_new_tokens", "device", "gpu", "machine", "cores", "threads", "hf_apar", "torch", "transformers")
Record = dict[str, Any]


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]


def cell(figure: Figure | None) -> str:
    return "-" if figure is None else str(Interval(figure["low"], figure["value"], figure["high"]))


def by_arm(record: Record, suites: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return a table of figures: a row for each arm, of one suite after the other."""
    there = [(suite, arm) for suite in suites for arm, found in record["figures"].items() if suite in found]
    named = [name for name in names if any(name in record["figures"][arm][suite] for suite, arm in there)]
    rows = [
        [f"{suite} ({count(record, suite)})", arm, *(cell(record["figures"][arm][suite].get(name)) for name in named)]
        for suite, arm in there
    ]
    return table(["prompts", "arm", *named], rows)


def count(record: Record, suite: str) -> int:
    return sum(record["suites"].values()) if suite == ALL else record["suites"][suite]


def against(record: Record, one: str, other: str, names: Sequence[str], suite: str = ALL) -> list[str]:
    """Return a sentence for each figure: what both arms have, and what the difference says."""
    found = record["differences"].get(pair_title(one, other), {}).get(suite, {})
    lines = []
    for name in names:
        if name in found:
            both = " against ".join(cell(record["figures"][arm][suite].get(name)) for arm in (one, other))
            lines.append(f"- `{name}`: {both}: {sentence(name, found[name])}, n={found[name]['n']}.")
    ratio = record["compared"].get(pair_title(one, other), {}).get("all" if suite == ALL else f"suite {suite}")
    return [*wall_clock(ratio), *lines] if "seconds" in names else lines


def wall_clock(ratio: Record | None) -> list[str]:
    """Return the sentence on one arm's seconds over another's."""
    if ratio is None:
        return []
    low, value, high = (ratio["seconds"][name] for name in ("low", "value", "high"))
    what = "too few answers to say" if ratio["count"] < FEW else "faster" if high < 1 else "slower" if low > 1 else "no gain"
    return [f"- Wall clock, sum over sum: {Interval(low, value, high)} of the other's: {what}, n={ratio['count']}."]


def beside_one(name: str, figure: Figure) -> str:
    """Return what a ratio to plain decoding of the same text says."""
    what = "less than" if figure["high"] < 1 else "more than" if figure["low"] > 1 else "no gain over"
    few = "too few answers to say: " if figure["n"] < FEW else f"{what} the same text in sequence, "
    return f"- `{name}`: {few}{cell(figure)} of it, n={figure['n']}."


def balance(record: Record, one: str, other: str) -> str:
    """Return a line on quality against speed: whether an arm is faster, and what becomes better and worse."""
    found = record["differences"].get(pair_title(one, other), {}).get(ALL, {})
    told = {what: [f"`{name}`" for name in QUALITY if name in found and says(name, found[name]) is what] for what in Says}
    clock = "".join(wall_clock(record["compared"].get(pair_title(one, other), {}).get("all"))).removeprefix("- ")
    sides = [f"{what}: {', '.join(told[what]) or 'nothing'}" for what in (Says.better, Says.worse)]
    few = f"; too few answers: {', '.join(told[Says.few])}" if told[Says.few] else ""
    return f"- {one} against {other}. {clock} Quality, {'; '.join(sides)}{few}."


def of_suites(suites: Record) -> Iterator[str]:
    """Yield what threads change with the same weights, and what other weights do."""
    lines = against(suites, "apar", "plain", ("tokens_per_step", *QUALITY))
    yield from section("With and without threads, same weights", lines)
    found = suites["figures"]["apar"]
    held = [beside_one(name, found[ALL][name]) for name in HELD if name in found[ALL]]
    slots = against(suites, "apar", "plain", ("peak_slots", "attended_per_token"))
    yield from section("KV cache and attention", [*held, *slots])
    for suite, what in (("nested", "Deeper structure"), ("languages", "Other languages"), ("formats", "Exact formats")):
        own = found.get(suite, {})
        shares = [f"- `{name}`: {cell(own[name])}, n={own[name]['n']}." for name in STRUCTURE if name in own]
        lines = [*shares, *against(suites, "apar", "plain", ("tokens_per_step", *QUALITY), suite)]
        yield from section(f"{what}: suite {suite}, {count(suites, suite)} prompts" if own else what, lines)
    for arm in suites["arms"]:
        if arm not in ("apar", "plain"):
            yield from section(f"{arm} against plain", against(suites, arm, "plain", QUALITY))


def of_deeper(deeper: Record) -> Iterator[str]:
    """Yield what comes of threads that may fork once more."""
    arms = [arm for arm in deeper["arms"] if arm != "apar"]
    for arm in arms:
        found = deeper["figures"][arm][ALL]
        shares = [f"- `{name}`: {cell(found[name])}, n={found[name]['n']}." for name in STRUCTURE if name in found]
        yield from section(
            f"Still deeper: {arm} against apar, suite nested",
            [*shares, *against(deeper, arm, "apar", ("tokens_per_step", *QUALITY))],
        )


def of_clock(clock: Record) -> Iterator[str]:
    """Yield what an answer takes by the clock, and what drafts add."""
    first, *others = clock["arms"]
    for one in others:
        kinds = (("forked", "fork"), ("unforked", "do not fork")) if one == "apar" else ()
        lines = against(clock, one, first, SPEED)
        for kind, what in kinds:
            found = wall_clock(clock["compared"].get(pair_title(one, first), {}).get(kind))
            lines += [f"{line[:-1]}, of the answers that {what} in threads." for line in found]
        yield from section(f"By the clock: {one} against {first}", lines)
    for other in (arm for arm in clock["arms"] if arm.startswith("apar+")):
        accepted = cell(clock["figures"][other][ALL].get("accepted"))
        lines = [*against(clock, other, "apar", SPEED), f"- `accepted`: {accepted} of the draft tokens."]
        yield from section(f"With drafts: {other} against apar", lines)
    yield from section("Quality against speed", [balance(clock, arm, first) for arm in others])


def of_chats(chats: Record, suites: Record | None) -> Iterator[str]:
    """Yield what share of real prompts forks, and whether the bound on their tokens hides any."""
    forks, limit = chats["figures"]["apar"][ALL]["forks"], chats["made_with"]["max_new_tokens"]
    lines = [f"- {cell(forks)} of {forks['n']} answers to what people asked an assistant fork within {limit} tokens."]
    if suites and (late := suites["figures"]["apar"][ALL].get("late_forks")):
        lines += [f"- `late_forks` of the prompts above: {cell(late)}, n={late['n']}: {METRICS['late_forks'].says}."]
    yield from section("How many real prompts fork", lines)


def judge(found: Comparison) -> str:
    """Return how far a judge agrees with itself."""
    return (
        f"- {found.judge}: the same in both orders for {found.consistency or '-'} of {found.judged} pairs; between what a blind "
        f"one would say (0) and always (1) that is {found.beyond_chance or '-'}. {found.alike} more pairs are of two answers that "
        "are alike."
    )


def of_judged(judged: Record) -> Iterator[str]:
    """Yield how far each judge agrees with itself, and what it prefers where it does."""
    for title, told in judged["judged"].items():
        lines = []
        for one in told["comparisons"]:
            found = Comparison(**{name: Interval(**said) if isinstance(said, dict) else said for name, said in one.items()})
            lines += [judge(found)]
            lines += [f"  - {warning}" for warning in found.warnings] or [
                f"  - Win rate {found.win_rate or '-'}, at equal length {found.length_controlled or '-'}."
            ]
        yield from section(f"Which answers a judge prefers: {title}", lines)


def questions(records: dict[str, Record]) -> Iterator[str]:
    """Yield the questions, and what the figures answer."""
    if "suites" in records:
        yield from of_suites(records["suites"])
    if "deeper" in records:
        yield from of_deeper(records["deeper"])
    if "clock" in records:
        yield from of_clock(records["clock"])
    if "chats" in records:
        yield from of_chats(records["chats"], records.get("suites"))
    if "judged" in records:
        yield from of_judged(records["judged"])
    yield from section("Larger models", ["- Not measured: one model was, of 135 million parameters."])


def section(name: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from ("", f"#### {name}", "", *lines)


def faulty(record: Record) -> list[tuple[str, float, str]]:
    """Return the arms with one fault: its kind, its probability, the arm."""
    found = []
    for arm in record["arms"]:
        kind, _, chance = arm.removeprefix("apar!").partition("=")
        if arm.count("!") == 1 and kind in FAULTS:
            found.append((kind, float(chance), arm))
    return sorted(found, key=lambda one: (list(FAULTS).index(one[0]), one[1]))


def changed(record: Record, one: str, other: str) -> dict[Says, list[str]]:
    found = record["differences"].get(pair_title(one, other), {}).get(ALL, {})
    return {what: [name for name in JUDGED if name in found and says(name, found[name]) is what] for what in Says}


def faults(record: Record) -> Iterator[str]:
    """Yield a table of what each fault does at each probability."""
    rows = [["none", "0", *(cell(record["figures"]["apar"][ALL].get(name)) for name in UNDER_FAULTS), "", ""]]
    for kind, chance, arm in faulty(record):
        told, figures = changed(record, arm, "apar"), record["figures"][arm][ALL]
        none = "too few answers" if told[Says.few] else "nothing"
        sides = [", ".join(told[what]) or none for what in (Says.worse, Says.better)]
        rows.append([kind, f"{chance:g}", *(cell(figures.get(name)) for name in UNDER_FAULTS), *sides])
    yield from table(["fault", "probability", *UNDER_FAULTS, "worse than without", "better"], rows)
    yield from ("", *(f"- `{name}`: {kind.says}." for name, kind in FAULTS.items()))


def measured(name: str, record: Record) -> Iterator[str]:
    settings = ", ".join(f"{what} {record['made_with'][what]}" for what in SETTINGS if record["made_with"].get(what))
    suites = ", ".join(f"{suite} ({number})" for suite, number in record["suites"].items())
    arms = f"{len(record['arms'])} arm{'s' * (len(record['arms']) > 1)}"
    yield f"- [`{name}`]({KEPT}/{name}.json), {FOLDERS[name]}: {arms}; {suites}. {settings}."


def plots(folder: Path, records: dict[str, Record], page: Path) -> dict[str, str]:
    """Copy the plots that the page shows; return what shows each, by the part's name."""
    made = {}
    wanted = (("suites", "Tokens per step"), ("clock", "Quality against speed"), ("faults", "Under faults"))
    for name, heading in wanted:
        if name in records and (file := records[name]["plots"].get(heading)):
            kept = page.parent / KEPT / f"{name}.png"
            if (new := folder / name / file).exists():
                kept.write_bytes(new.read_bytes())
            made[name] = f"![{heading}]({KEPT}/{kept.name})"
    return made


def whole(records: dict[str, Record], shown: dict[str, str]) -> str:
    """Return all that goes into the page."""
    lines = [
        "Measured by `make evaluation`; a figure stands before its 95 % interval. Where an interval has no width no answer differed, "
        "which others may. Differences are of the prompts that count on both sides.",
        "",
    ]
    for name, record in records.items():
        lines += measured(name, record)
    said = [
        f"- `{name}`: {line}"
        for name, record in records.items()
        for line in record["warnings"]
        if name in ("suites", "clock") or (name != "chats" and WORTHLESS in line)  # chats are cut on purpose
    ]
    lines += ["", "### Read this first", "", *said] if said else []
    parts = (("suites", "By suite"), ("clock", "All arms, on the clock"))
    for name, heading in parts:
        if name in records:
            suites = [ALL] if name == "clock" else [ALL, *records[name]["suites"]]
            lines += ["", f"### {heading}"]
            for names in (COST, STRUCTURE, WORDS):
                lines += ["", *by_arm(records[name], suites, names)]
            lines += ["", shown[name]] if name in shown else []
    lines += ["", "### The questions", *questions(records)]
    if "faults" in records:
        lines += ["", "### Structure that is wrong", "", *faults(records["faults"])]
        lines += ["", shown["faults"]] if "faults" in shown else []
    named = [name for name in METRICS if any(name in one for one in (COST, STRUCTURE, WORDS, HELD, JUDGED))]
    lines += ["", "### What the figures are", "", *(f"- `{name}`: {METRICS[name].says}." for name in named)]
    return "\n".join(lines) + "\n"


def readme(suites: Record, clock: Record | None) -> str:
    """Return README's tables: what threads do to answers of whole suites, and what some of them take by the clock."""
    rows = []
    for suite in (ALL, *(suite for suite, number in suites["suites"].items() if number >= FEW)):
        apar, plain = (suites["figures"][arm][suite] for arm in ("apar", "plain"))
        names = ("forks", "tokens_per_step", "peak_kv", "attended")
        ended = f"{cell(apar.get('ended'))}, plainly {cell(plain.get('ended'))}"
        rows.append([f"{suite} ({count(suites, suite)})", *(cell(apar.get(name)) for name in names), ended])
    kept = ("tokens per step", "peak KV, of sequential", "attended, of sequential")
    lines = table(["prompts", "fork", *kept, "end by themselves"], rows)
    if clock:
        first, rows = next(iter(clock["arms"])), []
        for arm in (arm for arm in clock["arms"] if arm.startswith("apar")):
            found = clock["compared"][pair_title(arm, first)]
            for kind, what in (("all", "all"), ("forked", "those that fork"), ("unforked", "those that do not")):
                if one := found.get(kind):
                    ratio = Interval(*(one["seconds"][name] for name in ("low", "value", "high")))
                    few = " (few)" if one["count"] < FEW else ""
                    rows.append([arm, what, f"{one['count']}{few}", str(ratio)])
        lines += ["", *table(["arm", "answers", "n", f"seconds, of {first}"], rows)]
    return "\n".join(lines) + "\n"


def read(folder: Path, kept: Path) -> dict[str, Record]:
    """Return what was measured, by part: what ``folder`` has, which is kept from then on, and else what was kept before."""
    kept.mkdir(exist_ok=True)
    records: dict[str, Record] = {}
    for name in FOLDERS:
        new, before = folder / name / "figures.json", kept / f"{name}.json"
        if new.exists():
            record = fit_to_keep(json.loads(new.read_text(encoding="utf-8")))
            before.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        if before.exists():
            records[name] = json.loads(before.read_text(encoding="utf-8"))
    return records


def short(arm: str) -> str:
    """Return an arm's name without the folder of its model."""
    head, *changes = arm.split("!")
    return "!".join((head.partition("=")[0], *changes))


def fit_to_keep(record: Record) -> Record:
    """Return a record that names no folder, and numbers short enough for a repository."""
    made_with = {name: value for name, value in record["made_with"].items() if name in SETTINGS}
    if len({short(arm) for arm in record["arms"]}) < len(record["arms"]):
        raise SystemExit(f"two of these arms have one name without their folders: {', '.join(record['arms'])}")
    text = json.dumps({**record, "made_with": made_with}, ensure_ascii=False)
    for arm in sorted(record["arms"], key=len, reverse=True):
        text = text.replace(json.dumps(arm, ensure_ascii=False)[1:-1], short(arm))
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.{DIGITS}g}"))  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of make evaluation")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    records = read(options.folder, options.page.parent / KEPT)
    text = options.page.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    after = rest[rest.index(END) :]
    made = whole(records, plots(options.folder, records, options.page))
    options.page.write_text(f"{before}{START}\n{made}\n{after}", encoding="utf-8")
    if "suites" in records:
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "readme.md").write_text(readme(records["suites"], records.get("clock")), encoding="utf-8")


if __name__ == "__main__":
    main()
