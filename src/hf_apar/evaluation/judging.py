"""What judges say of the arms: each against the first one, on the same prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_apar.evaluation.agreement import Agreement, Judged, agreement
from hf_apar.evaluation.answers import Answered, Key
from hf_apar.evaluation.arms import AnyArm
from hf_apar.evaluation.differences import pair_title
from hf_apar.evaluation.judge import JudgeServer, ask_judge
from hf_apar.evaluation.preference import compare_pairs, preferences
from hf_apar.evaluation.run import Told
from hf_apar.evaluation.suites import Prompt
from hf_apar.evaluation.verdicts import Pair, Preference, Verdict, VerdictKey, shown_answer, shown_prompt


def judge_arms(
    judges: Sequence[JudgeServer],
    arms: Sequence[AnyArm],
    prompts: Sequence[Prompt],
    answers: Mapping[Key, Answered],
    path: Path,
    progress: Told,
) -> dict[str, Judged]:
    """Let ``judges`` compare each of ``arms`` with the first one, and return by title what they say.

    Args:
        path: the file of verdicts.

    Raises:
        ConfigurationError, DataError, ServerError: as :func:`~hf_apar.evaluation.judge.ask_judge`.
    """
    first, *others = (arm.name for arm in arms)
    pairs = {
        pair_title(other, first): [
            Pair(shown_prompt(prompt), *(shown_answer(prompt, arm, answers) for arm in (other, first))) for prompt in prompts
        ]
        for other in others
    }
    all_pairs, models = [pair for some in pairs.values() for pair in some], [arm.loaded.name for arm in arms]
    verdicts: dict[VerdictKey, Verdict] = {}
    for judge in judges:
        verdicts |= ask_judge(
            judge, all_pairs, path, arms=models, progress=lambda given, wanted: progress(given, wanted, None)
        )
    different = {title: [pair for pair in some if pair.first != pair.second] for title, some in pairs.items()}
    return {
        title: Judged(
            tuple(compare_pairs(judge.identity, some, verdicts) for judge in judges),
            _agreement([preferences(judge.identity, different[title], verdicts) for judge in judges[:2]]),
        )
        for title, some in pairs.items()
    }


def _agreement(told: Sequence[Sequence[Preference | None]]) -> Agreement | None:
    if len(told) < 2 or not any(None not in pair for pair in zip(*told, strict=True)):
        return None
    return agreement(*told[:2])
