"""A whole evaluation in a folder: answers, figures, plots and the report; what is there is not made again."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hf_apar.checkpoints.made_with import differences, digest, note, noted
from hf_apar.checkpoints.writing import alone, write_whole
from hf_apar.errors import ConfigurationError, DataError, MissingPackageError
from hf_apar.evaluation.agreement import Judged
from hf_apar.evaluation.alpaca_format import write_alpaca
from hf_apar.evaluation.answers import Answered, Key
from hf_apar.evaluation.arms import AnyArm
from hf_apar.evaluation.differences import compare_figures, pairs_of
from hf_apar.evaluation.extras import Measure, measure_all
from hf_apar.evaluation.figures import Rows, figures, warnings
from hf_apar.evaluation.lines import whole_lines
from hf_apar.evaluation.machine import surroundings
from hf_apar.evaluation.paired import compare
from hf_apar.evaluation.report import Report, markdown
from hf_apar.evaluation.rows import rows_by_arm
from hf_apar.evaluation.run import Told, answer_all
from hf_apar.evaluation.suites import Prompt, suite_named
from hf_apar.evaluation.verdicts import shown_prompt
from hf_apar.tree.threads import Decodes

if TYPE_CHECKING:
    from hf_apar.evaluation.judge import JudgeServer


def prompts_of(suites: Sequence[str], *, sample: int | None = None, seed: int = 0, turns: int = 1) -> list[Prompt]:
    """Return the prompts of all ``suites``, each once; see :func:`~hf_apar.evaluation.suites.suite_named`.

    Raises:
        ConfigurationError, DataError: as there.
        DataError: if two prompts have one key.
    """
    found: dict[str, Prompt] = {}
    for suite in suites:
        for prompt in suite_named(suite, sample=sample, seed=seed, turns=turns):
            if found.setdefault(prompt.key, prompt) != prompt:
                raise DataError(f"two suites have a prompt {prompt.key}, and these differ; rename one of the files")
    return list(found.values())


def evaluate(
    arms: Sequence[AnyArm],
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    settings: Mapping[str, object],
    max_new_tokens: int = 512,
    batch_size: int = 1,
    measures: Sequence[Measure] = (),
    judges: "Sequence[JudgeServer]" = (),
    telling: Callable[[str], Told] = lambda what: _nobody,
) -> Report:
    """Let ``arms`` answer ``prompts``, and write what came of it into ``folder``; go on where it was stopped.

    There are ``answers.jsonl``, ``extras.jsonl`` of what was measured of them, ``verdicts.jsonl`` of judges,
    ``figures.json``, ``report.md`` with its plots, and ``alpaca/``, the answers of each arm for alpaca_eval. Later calls may
    name more arms and other prompts: what a call does not name stays in the files and does not count. All arms are compared
    with the first, and those with drafts with the same without.

    Args:
        settings: that the answers depend on, :meth:`~hf_apar.evaluation.models.Models.settings` and a seed.
        batch_size: as for :func:`~hf_apar.evaluation.run.answer_all`.
        measures: of what is not known of an answer by itself, such as its likelihood.
        telling: returns who is told of the answers, of the answers measured and of the verdicts, by these words.

    Raises:
        ConfigurationError: if the folder has answers that were made with other settings, versions or machine, by other
            weights of the same name, or to other prompts of the same keys; or a judge would judge its own answers; or
            another process evaluates there.
        DataError, ServerError: as :func:`~hf_apar.evaluation.run.answer_all`, and as the judge.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        made_with = {**settings, "max_new_tokens": max_new_tokens, "batched": batch_size > 1, **surroundings()}
        _agree(folder, made_with, prompts, arms)
        file = folder / "answers.jsonl"
        answers = answer_all(
            arms, prompts, file, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=telling("answers")
        )
        tokenizers = {arm.name: cast(Decodes, arm.loaded.tokenizer) for arm in arms}
        rows = rows_by_arm(prompts, answers, tokenizers)
        if measures:
            extras = measure_all(measures, rows, folder / "extras.jsonl", progress=telling("answers measured"))
            rows = rows_by_arm(prompts, answers, tokenizers, extras)
        judged: dict[str, Judged] = {}
        if judges:
            from hf_apar.evaluation.judging import judge_arms  # needs the extra evaluate

            judged = judge_arms(judges, arms, prompts, answers, folder / "verdicts.jsonl", telling("verdicts"))
        report = _reported(arms, prompts, rows, made_with, judged, folder)
        _write(report, prompts, answers, folder)
        return report


def _reported(
    arms: Sequence[AnyArm], prompts: Sequence[Prompt], rows: Rows, made_with: Mapping[str, object],
    judged: Mapping[str, Judged], folder: Path,
) -> Report:  # fmt: skip
    two = {title: (rows[one], rows[other]) for title, (one, other) in pairs_of([arm.name for arm in arms]).items()}
    return Report(
        made_with=made_with,
        arms={arm.name: arm.says for arm in arms},
        suites=dict(Counter(prompt.suite for prompt in prompts)),
        warnings=warnings(rows),
        figures=figures(rows),
        compared={title: clocks for title, pair in two.items() if (clocks := compare(*pair))},
        differences={title: compare_figures(*pair) for title, pair in two.items()},
        judged=judged,
        plots=_plots(rows, folder),
    )


def _agree(folder: Path, made_with: Mapping[str, object], prompts: Sequence[Prompt], arms: Sequence[AnyArm]) -> None:
    """Note what answers are made with, and refuse to mix them with those that were made otherwise."""
    file = folder / "settings.json"
    before: dict[str, object] = {"made_with": made_with}
    if whole_lines(folder / "answers.jsonl"):
        if (found := noted(file)) is None:
            raise ConfigurationError(
                f"{folder} has answers and no {file.name} that says how they were made; name another one"
            )
        before = found
    if other := differences(cast(Mapping[str, object], before["made_with"]), made_with):
        raise ConfigurationError(
            f"the answers in {folder} were made with {', '.join(other.values())}; go on with that, or name another folder"
        )
    known, weights = (cast(dict[str, str], before.get(name, {})) for name in ("prompts", "weights"))
    for prompt in prompts:
        content = digest(json.dumps([prompt.messages, prompt.after]))[:16]
        if known.setdefault(prompt.key, content) != content:
            raise ConfigurationError(
                f"the prompt {prompt.key} is another one than what was answered in {folder}; name another folder"
            )
    for arm in arms:
        if weights.setdefault(arm.name, arm.loaded.weights) != arm.loaded.weights:
            raise ConfigurationError(
                f"the arm {arm.name} has other weights or settings than those that answered in {folder}; name another folder"
            )
    note(file, {"made_with": made_with, "weights": weights, "prompts": known})


def _nobody(done: int, total: int, left: float | None) -> None:
    """Is told, and does not listen."""


def _plots(rows: Rows, folder: Path) -> dict[str, str]:
    try:
        from hf_apar.evaluation.plots import draw
    except MissingPackageError:
        return {}
    return draw(rows, folder)


def _write(report: Report, prompts: Sequence[Prompt], answers: Mapping[Key, Answered], folder: Path) -> None:
    write_whole(folder / "figures.json", json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "report.md", markdown(report))
    for arm in report.arms:
        file = folder / "alpaca" / (re.sub(r"[^\w.+=!-]", "_", arm) + ".json")
        texts = {shown_prompt(prompt): answers[prompt.key, arm].text for prompt in prompts}
        write_alpaca(file, texts, generator=arm, dataset=" ".join(report.suites))
