"""A judge that compares two answers: a model behind any OpenAI-compatible server (extra ``evaluate``).

Ask it about both orders of all pairs, and then see what its verdicts are worth before what they say::

    judge = JudgeServer(url="http://localhost:8000/v1", model="Qwen/Qwen3-32B")
    pairs = [Pair(prompt, apar[prompt], plain[prompt]) for prompt in prompts]
    verdicts = ask_judge(judge, pairs, Path("verdicts.jsonl"), arms=("apar-135m", "SmolLM2-135M-Instruct"))
    print(compare_pairs(judge.identity, pairs, verdicts).consistency)
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from hf_apar.checkpoints.made_with import digest
from hf_apar.data.records.chats import Message
from hf_apar.errors import ConfigurationError, ServerError
from hf_apar.evaluation.chat_server import ChatServer
from hf_apar.evaluation.judge_prompt import QUESTION, preference_in, question
from hf_apar.evaluation.lines import opened_for_more
from hf_apar.evaluation.verdicts import Pair, Verdict, VerdictKey, read_verdicts, verdict_key, write_verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JudgeServer(ChatServer):
    """A model that judges, and how it is asked; replies that are cut hold no verdict.

    A judge prefers what it would have written itself (arXiv 2306.05685, section 3.3): take one of another family than the
    models that are compared.
    """

    @property
    def identity(self) -> str:
        """The model's name with a digest of what it is asked and of the parameters, but not of where it runs."""
        return f"{self.model} {digest(QUESTION + json.dumps(dict(self.parameters), sort_keys=True))[:12]}"


def ask_judge(
    judge: JudgeServer,
    pairs: Sequence[Pair],
    path: Path,
    *,
    arms: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> dict[VerdictKey, Verdict]:
    """Ask about ``pairs`` in both orders, and return all verdicts of the file ``path``.

    Each verdict is appended to the file at once, and what stands there is not asked again, replies without a verdict
    included. Two answers that are alike are not asked about. A request that fails for good is told in a warning, and asked
    again by the next call.

    Args:
        arms: names of the models that wrote the answers.
        progress: told how many of the verdicts are there, and how many are wanted, at first and after each.

    Raises:
        ConfigurationError: if the judge is one of the arms.
        DataError: if ``path`` is no file of verdicts.
        ServerError: if five requests in a row fail for good. The verdicts until then are kept.
    """
    refuse_own_judge(judge.model, arms)
    verdicts = read_verdicts(path)
    shown = [one for pair in pairs if pair.first != pair.second for one in (pair, pair.swapped)]
    wanted = {verdict_key(one, judge.identity): one for one in shown}
    missing = {key: one for key, one in wanted.items() if key not in verdicts}
    given, failed, last = len(wanted) - len(missing), 0, None
    tell = progress or (lambda given, wanted: None)
    tell(given, len(wanted))
    chats = {key: [Message(role="user", content=question(one))] for key, one in missing.items()}
    with opened_for_more(path) as file, closing(judge.ask(chats)) as replies:
        for key, reply in replies:
            if isinstance(reply, ServerError):
                failed, last = failed + 1, reply
                continue
            verdicts[key] = Verdict(key, preference_in(reply.text) if reply.ended else None, reply.text)
            write_verdict(file, verdicts[key])
            given += 1
            tell(given, len(wanted))
    if failed:
        logger.warning("%d verdicts of %d were not given, at last: %s", failed, len(wanted), last)
    return verdicts


def refuse_own_judge(model: str, arms: Sequence[str]) -> None:
    """Raise :class:`ConfigurationError` if ``model`` is one of ``arms``, by the last part of their names."""
    for arm in arms:
        if _last_part(arm) == _last_part(model):
            raise ConfigurationError(f"the judge {model} would judge its own answers, as {arm}; give another model as judge")


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()
