"""A judge that compares two answers: a model behind any OpenAI-compatible server (extra ``evaluate``).

Ask it about both orders of all pairs, and then see what its verdicts are worth before what they say::

    judge = JudgeServer(url="http://localhost:8000/v1", model="Qwen/Qwen3-32B")
    pairs = [Pair(prompt, apar[prompt], plain[prompt]) for prompt in prompts]
    verdicts = ask_judge(judge, pairs, Path("verdicts.jsonl"), arms=("apar-135m", "SmolLM2-135M-Instruct"))
    print(compare_pairs(judge.identity, pairs, verdicts).consistency)
"""

import json
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Event

from hf_apar.errors import ConfigurationError, MissingPackageError, ServerError

try:
    import httpx2
except ImportError as error:
    raise MissingPackageError("a judge needs httpx2; run pip install 'hf-apar[evaluate]'") from error

from hf_apar.checkpoints.made_with import digest
from hf_apar.evaluation.judge_prompt import QUESTION, preference_in, question
from hf_apar.evaluation.lines import opened_for_more
from hf_apar.evaluation.verdicts import Pair, Verdict, VerdictKey, read_verdicts, verdict_key, write_verdict

logger = logging.getLogger(__name__)

_PATIENCE = 5  # requests in a row that fail for good until all stops
_LONGEST_PAUSE = 60.0  # seconds
_CONNECT = 10.0  # seconds


@dataclass(frozen=True, kw_only=True)
class JudgeServer:
    """A model that judges, and how it is asked.

    A judge prefers what it would have written itself (arXiv 2306.05685, section 3.3): take one of another family than the
    models that are compared.

    Args:
        url: of the API, such as ``http://localhost:8000/v1``.
        model: its name there.
        key_variable: the environment variable that holds the key; no key is sent without.
        parameters: of a completion, beside model and messages. Replies that are cut hold no verdict.
        timeout: seconds that the server may say nothing.
        retries: of a request that was not answered, or with status 408, 425, 429 or 500 and above.
        pause: seconds before the first retry, twice as many before each other, a minute at most.
        concurrency: requests at once.

    Raises:
        ConfigurationError: if one of them cannot be, or the variable is not set.
    """

    url: str
    model: str
    key_variable: str | None = None
    parameters: Mapping[str, object] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 512})
    timeout: float = 120.0
    retries: int = 5
    pause: float = 1.0
    concurrency: int = 8

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or "@" in self.url:
            raise ConfigurationError(f"the judge's address is {self.url!r}; give one such as http://localhost:8000/v1")
        if self.timeout <= 0 or self.retries < 0 or self.pause < 0 or self.concurrency < 1:
            raise ConfigurationError(
                f"{self} cannot be asked; give timeout > 0, retries and pause of at least 0, concurrency of at least 1"
            )
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise ConfigurationError(f"the variable {self.key_variable} holds no key for {self.url}; set it or name another")

    @property
    def identity(self) -> str:
        """The model's name with a digest of what it is asked and of the parameters, but not of where it runs."""
        return f"{self.model} {digest(QUESTION + json.dumps(dict(self.parameters), sort_keys=True))[:12]}"

    def client(self) -> httpx2.Client:
        """Return connections to the server."""
        key = os.environ[self.key_variable] if self.key_variable else None
        return httpx2.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, _CONNECT), pool=None),
            limits=httpx2.Limits(max_connections=self.concurrency),
        )


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
    stop, failures, given = Event(), _Failures(), len(wanted) - len(missing)
    tell = progress or (lambda given, wanted: None)
    tell(given, len(wanted))
    with opened_for_more(path) as file, judge.client() as client, ThreadPoolExecutor(judge.concurrency) as pool:
        asked = {pool.submit(_reply, client, judge, one, stop): key for key, one in missing.items()}
        try:
            for done in as_completed(asked):
                if (reply := failures.reply_of(done)) is not None:
                    key = asked[done]
                    verdicts[key] = Verdict(key, preference_in(reply), reply)
                    write_verdict(file, verdicts[key])
                    given += 1
                    tell(given, len(wanted))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    if failures.total:
        logger.warning("%d verdicts of %d were not given, at last: %s", failures.total, len(wanted), failures.last)
    return verdicts


def refuse_own_judge(model: str, arms: Sequence[str]) -> None:
    """Raise :class:`ConfigurationError` if ``model`` is one of ``arms``, by the last part of their names."""
    for arm in arms:
        if _last_part(arm) == _last_part(model):
            raise ConfigurationError(f"the judge {model} would judge its own answers, as {arm}; give another model as judge")


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


@dataclass
class _Failures:
    """Requests that failed for good: how many, how many in a row, and why the last one did."""

    total: int = 0
    in_a_row: int = 0
    last: ServerError | None = None

    def reply_of(self, done: "Future[str]") -> str | None:
        try:
            reply = done.result()
        except ServerError as error:
            self.total, self.in_a_row, self.last = self.total + 1, self.in_a_row + 1, error
            if self.in_a_row < _PATIENCE:
                return None
            raise ServerError(
                f"the judge failed {_PATIENCE} times in a row, at last: {error}; what it said until then is kept, and the "
                "next call goes on from there"
            ) from error
        self.in_a_row = 0
        return reply


def _reply(client: httpx2.Client, judge: JudgeServer, pair: Pair, stop: Event) -> str:
    """Return what the judge says of ``pair`` in this order, asked again until it says something or there is no use."""
    body = dict(judge.parameters) | {"model": judge.model, "messages": [{"role": "user", "content": question(pair)}]}
    for attempt in count():
        pause, again = judge.pause * 2**attempt * random.uniform(0.5, 1.0), True
        try:
            response = client.post("chat/completions", json=body)
            if response.is_success:
                return _content(response)
            error = ServerError(f"{client.base_url} answers with status {response.status_code}: {response.text[:300]}")
            again = response.status_code in (408, 425, 429) or response.status_code >= 500
            pause = max(pause, _seconds(response.headers.get("retry-after")))
        except httpx2.RequestError as failed:
            error = ServerError(f"{client.base_url} does not answer: {type(failed).__name__} {failed}".rstrip())
        except ServerError as failed:
            error = failed
        if not again or attempt == judge.retries or stop.wait(min(pause, _LONGEST_PAUSE)):
            raise error
    raise AssertionError("count() has no end")


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.isdecimal() else 0.0


def _content(response: httpx2.Response) -> str:
    """Return the text of a chat completion; none where a model stopped within its thoughts."""
    try:
        content = response.json()["choices"][0]["message"]["content"] or ""
    except (LookupError, TypeError, ValueError) as error:
        raise ServerError(f"{response.url} answers with no chat completion: {response.text[:300]}") from error
    if not isinstance(content, str):
        raise ServerError(f"{response.url} answers with content that is no text: {response.text[:300]}")
    return content
