"""What a client is told in place of an answer: a status and OpenAI's error object."""

import json
from collections.abc import Mapping
from typing import Any

from hf_apar.errors import AparError

_KINDS = {400: "invalid_request_error", 404: "not_found_error", 413: "invalid_request_error", 503: "overloaded_error"}


class ApiError(AparError, RuntimeError):
    """An HTTP status and what goes with it.

    Args:
        status: of the answer.
        message: what was got, what was wanted, how to mend it.
        param: the field of the request that is wrong.
        body: of an error that is passed on as it came; else one is made.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, dict(headers or {})
        self._body = body

    @property
    def told(self) -> dict[str, Any]:
        """The error as OpenAI's API words it."""
        if self._body is not None:
            try:
                found = json.loads(self._body)
            except ValueError:
                found = None
            if isinstance(found, dict) and found.get("error") is not None:
                return found
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.status}}

    @property
    def body(self) -> bytes:
        """The body of the answer: what came from upstream, or :attr:`told`."""
        return self._body if self._body is not None else json.dumps(self.told).encode()


class Unreachable(ApiError):
    """An upstream that took no connection: another one may take the request."""


class Busy(ApiError):
    """An upstream that takes no further request now: one that waits may be tried again."""


class Reworded(ApiError):
    """A request that was refused for its words: the same thing is said in others from now on."""


def refuse(param: str, message: str) -> ApiError:
    """Return the error for a request whose field ``param`` is wrong."""
    return ApiError(400, message, param=param)
