"""vLLM's own server as a process on this machine, for as long as a ``with`` block lasts: for scripts and tests."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from hf_apar.errors import ServerError

AT_REST = ("vllm:num_requests_running", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc")


class LocalServer:
    """``vllm serve MODEL`` on a free port of loopback.

    Args:
        model: a folder that ``hf-apar merge`` wrote.
        arguments: of ``vllm serve``.
        environment: variables beside those of this process.
        patience: seconds until the server must answer.

    Attributes:
        url: address, such as ``http://127.0.0.1:41234``; the API is at ``/v1``.
    """

    def __init__(
        self, model: Path | str, *arguments: str, environment: Mapping[str, str] | None = None, patience: float = 300.0
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.patience = patience
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed by `stop`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hf_apar.serving.vllm.launch", "serve", str(model), "--host", "127.0.0.1",
             "--port", str(self.port), *arguments],
            stdout=self._log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})},
        )  # fmt: skip

    def __enter__(self) -> Self:
        try:
            return self.wait()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def wait(self) -> Self:
        """Return once the server answers.

        Raises:
            ServerError: if it ends before, or is not there in time; with the end of what it printed.
        """
        end = time.monotonic() + self.patience
        while self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return self
            except OSError:
                if time.monotonic() > end:
                    raise ServerError(f"vLLM does not answer after {self.patience:.0f} s:\n{self.log}") from None
                time.sleep(0.5)
        raise ServerError(f"vLLM ended before it could answer:\n{self.log}")

    @property
    def log(self) -> str:
        """The end of what the server has printed."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")[-4000:]

    def metric(self, name: str) -> float:
        """Return the sum of the metrics whose lines begin with ``name``."""
        with urllib.request.urlopen(f"{self.url}/metrics") as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def await_rest(self, seconds: float = 30.0) -> dict[str, float]:
        """Wait until no request runs or waits and no block is held; return what is left of these after ``seconds``."""
        end = time.monotonic() + seconds
        while True:
            left = {name: value for name in AT_REST if (value := self.metric(name))}
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server, at once if it does not end by itself in half a minute."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()
