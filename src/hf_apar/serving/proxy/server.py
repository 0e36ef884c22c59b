"""The proxy as a program: it asks its upstreams what they are, and serves."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx2
import uvicorn

from hf_apar.errors import ConfigurationError, ServerError
from hf_apar.serving.admission import AdmissionPolicy, EqualShare
from hf_apar.serving.proxy.app import ProxyServer, ProxySettings
from hf_apar.serving.proxy.dialects import DIALECTS, Dialect
from hf_apar.serving.proxy.discovery import About, ask, check_ids, dialect_for
from hf_apar.serving.proxy.metrics import ProxyMetrics
from hf_apar.serving.proxy.pool import Pool
from hf_apar.serving.proxy.served import Served, load_served
from hf_apar.serving.proxy.upstream import Upstream

logger = logging.getLogger(__name__)

HEADERS: Mapping[str, Any] = {"server_header": False, "date_header": False}
"""Of the web server: what is passed on has the upstream's own."""

_CONNECT = 5.0  # seconds until an upstream that takes no connection is given up
_IDLE = 2.0  # seconds that a connection is kept for the next request: servers close theirs after 5, some at that moment
_GRACE = 30  # seconds that answers have to end after the proxy was told to stop


@dataclass(frozen=True)
class Upstreams:
    """Where a proxy's upstreams are, and how they are talked to.

    Attributes:
        urls: of their APIs.
        model: the folder or the name on the Hub of the model that they serve; ``None`` to ask them.
        dialect: the kind of server: a name in :data:`DIALECTS <hf_apar.serving.proxy.dialects.DIALECTS>`, or ``auto``.
        max_length: tokens of the model's context; ``None`` to ask.
        key: for what the proxy itself asks of them.
        timeout: seconds that one of them may say nothing.
        policy: decides when children start.
    """

    urls: Sequence[str]
    model: str | None = None
    dialect: str = "auto"
    max_length: int | None = None
    key: str | None = None
    timeout: float = 600.0
    policy: AdmissionPolicy = field(default_factory=EqualShare)

    def __post_init__(self) -> None:
        if not self.urls:
            raise ConfigurationError(
                "no upstream is named; give the address of one at least, such as http://localhost:8000/v1"
            )
        for url in self.urls:
            if not url.startswith(("http://", "https://")) or "@" in url:
                raise ConfigurationError(f"the address of an upstream is {url!r}; give one such as http://localhost:8000/v1")
        if self.dialect not in ("auto", *DIALECTS):
            raise ConfigurationError(f"the dialect is {self.dialect!r}; give auto, {' or '.join(DIALECTS)}")


async def make_proxy(where: Upstreams, settings: ProxySettings) -> ProxyServer:
    """Ask the upstreams what they are, and return the proxy; one that does not answer is left out until it does.

    Raises:
        ServerError: if none answers, or one neither takes nor gives token ids.
        ConfigurationError: if something is not known and cannot be asked.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=_IDLE)
    timeout = httpx2.Timeout(where.timeout, connect=_CONNECT, pool=None)
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # one client's are no business of another's
    client, metrics = httpx2.AsyncClient(timeout=timeout, limits=limits, cookies=no_cookies), ProxyMetrics()
    try:
        return await _made(where, settings, client, metrics)
    except BaseException:
        await client.aclose()
        raise


async def _made(where: Upstreams, settings: ProxySettings, client: httpx2.AsyncClient, metrics: ProxyMetrics) -> ProxyServer:
    headers = {"authorization": f"Bearer {where.key}"} if where.key else {}
    urls, told, errors = [url.rstrip("/") for url in where.urls], dict[str, About](), list[ServerError]()
    for url in urls:
        try:
            told[url] = await ask(client, url, headers)
        except ServerError as error:
            logger.warning("%s", error)
            errors.append(error)
    if not told:
        raise errors[0]
    served = await asyncio.to_thread(_model, where, next(iter(told.values())))

    async def look(url: str) -> tuple[Dialect, int]:
        about = await ask(client, url, headers)
        dialect = dialect_for(where.dialect, about, url, served)
        await check_ids(client, url, dialect, about, headers)
        length = where.max_length or about.max_length or served.max_length
        if length is None:
            raise ConfigurationError(f"neither {url} nor {served.name} tells how long a context may be; pass --max-length")
        return dialect, length

    known = {url: await look(url) for url in told}
    like = next(iter(known.values()))  # so are the others thought of until they answer
    upstreams = []
    for url in urls:
        upstream = Upstream(url, client, *known.get(url, like), where.policy, metrics)
        upstream.set_up(url in known)
        upstreams.append(upstream)
    return ProxyServer(served, Pool(upstreams, look), client, settings, metrics)


def _model(where: Upstreams, about: About) -> Served:
    if where.model is not None:
        return load_served(where.model)
    if about.root is None:
        raise ConfigurationError("the upstream does not tell where its model is; pass --model, a folder or Hub name")
    try:
        return load_served(about.root)
    except OSError as error:
        raise ConfigurationError(
            f"the upstream serves {about.root}, which cannot be read here ({error}); pass --model, a folder with its "
            "tokenizer and configuration"
        ) from error


async def serve(where: Upstreams, settings: ProxySettings, host: str, port: int) -> None:
    """Serve until the process is told to stop; answers in flight have half a minute to end."""
    proxy = await make_proxy(where, settings)
    config = uvicorn.Config(
        proxy.app(), host=host, port=port, log_level="info", timeout_graceful_shutdown=_GRACE, **HEADERS
    )
    await uvicorn.Server(config).serve()
