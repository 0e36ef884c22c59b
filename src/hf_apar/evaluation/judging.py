"""What judges say of the arms: each against the first one, on the same prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_apar.evaluation.agreement import Agreement, Judged, agreement
from hf_apar.evaluation.answers import Answered, Key
from hf_apar.evaluation.judge import JudgeServer, ask_judge
from hf_apar.evaluation.preference import compare_pairs, preferences
from hf_apar.evaluation.run import Told
from hf_apar.evaluation.suites import Prompt
from hf_apar.evaluation.verdicts import Pair, Preference, Verdict, VerdictKey, shown_answer, shown_prompt


def judge_arms(
    judges: Sequence[JudgeServer],
    prompts: Sequence[Prompt],
    answers: Mapping[Key, Answered],
    pairs_of_arms: Mapping[str, tuple[str, str]],
    path: Path,
    *,
    models: Sequence[str],
    progress: Told | None = None,
) -> dict[str, Judged]:
    """Let ``judges`` compare arms, by title, and return what they say.

    Args:
        pairs_of_arms: the names of two arms, by title.
        path: the file of verdicts.
        models: that wrote the answers; none of them may judge.

    Raises:
        ConfigurationError, DataError, ServerError: as :func:`~hf_apar.evaluation.judge.ask_judge`.
    """
    pairs = {
        title: [Pair(shown_prompt(prompt), *(shown_answer(prompt, arm, answers) for arm in two)) for prompt in prompts]
        for title, two in pairs_of_arms.items()
    }
    all_pairs = [pair for some in pairs.values() for pair in some]
    tell = None if progress is None else lambda given, wanted: progress(given, wanted, None)
    verdicts: dict[VerdictKey, Verdict] = {}
    for judge in judges:
        verdicts |= ask_judge(judge, all_pairs, path, arms=models, progress=tell)
    return {
        title: Judged(
            tuple(compare_pairs(judge.identity, some, verdicts) for judge in judges),
            _agreement([preferences(judge.identity, some, verdicts) for judge in judges[:2]]),
        )
        for title, some in pairs.items()
    }


def _agreement(told: Sequence[Sequence[Preference | None]]) -> Agreement | None:
    if len(told) < 2 or not any(None not in pair for pair in zip(*told, strict=True)):
        return None
    return agreement(*told[:2])
