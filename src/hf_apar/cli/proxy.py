"""The command that serves OpenAI's API in threads in front of another server: proxy."""

from enum import StrEnum
from typing import Annotated

import typer

from hf_apar.cli.common import app, known_model


class Switch(StrEnum):
    """On or off."""

    on = "on"
    off = "off"


@app.command("proxy")
def proxy_command(
    base_url: Annotated[
        list[str], typer.Option(help="Address of a server's API, such as http://localhost:8000/v1; may be given again.")
    ],
    served: Annotated[
        str | None,
        typer.Option(
            "--model", callback=known_model, help="Folder or Hub name of the served model; default: what the server says."
        ),
    ] = None,
    dialect: Annotated[str, typer.Option(help="Kind of server: vllm, llama.cpp or sglang; auto: ask it.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8080,
    default: Annotated[Switch, typer.Option(help="Threads for requests that do not say.")] = Switch.on,
    policy: Annotated[
        str | None,
        typer.Option(help="When threads start: eager, cap:N of an answer, share:N of a server; default: a fair share."),
    ] = None,
    max_threads: Annotated[int, typer.Option(min=1, help="Threads of an answer at once.")] = 32,
    max_answers: Annotated[int, typer.Option(min=1, help="Answers in flight; beyond that requests get status 503.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="Longest request, in MiB.")] = 32,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of pages whose scripts may ask from a browser, * for all; may be given again."),
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of the model's context; default: as told.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a server may say nothing.")] = 600.0,
    key: Annotated[
        str | None,
        typer.Option(
            envvar="HF_APAR_UPSTREAM_KEY", help="Key for what the proxy itself asks the servers; clients send their own."
        ),
    ] = None,
) -> None:
    """Serve OpenAI's API in threads in front of vLLM, llama.cpp's server or SGLang, as they are."""
    import asyncio

    from hf_apar.serving.admission import EqualShare, policy_named
    from hf_apar.serving.proxy.app import ProxySettings
    from hf_apar.serving.proxy.server import Upstreams, serve

    where = Upstreams(base_url, served, dialect, max_length, key, timeout, policy_named(policy) if policy else EqualShare())
    settings = ProxySettings(default is Switch.on, max_threads, max_answers, max_body * 2**20, allowed_origin or ())
    asyncio.run(serve(where, settings, host, port))
