"""The settings of APAR decoding."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Self

from hf_apar.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class AparConfig:
    """How a model forks; what is ``None`` is taken from the checkpoint.

    Attributes:
        fork_token_id: id of [Fork], the token that a model emits to start a thread (paper, section 3.1).
        child_token_id: id of [Child], the token that is injected as a new thread's first.
        max_threads: live threads of one row; a fork beyond that happens, its child waits. At least 1.
        max_depth: deepest thread that may exist; the root has depth 1, so 1 forbids forks. At least 1.
        fork_bias: added to the logit of [Fork], a knob against missed forks; ``-inf`` forbids forks.

    Raises:
        ConfigurationError: if a value is out of its range.

    >>> AparConfig(max_threads=8).to_dict()["max_threads"]
    8
    """

    fork_token_id: int | None = None
    child_token_id: int | None = None
    max_threads: int = 32
    max_depth: int = 3
    fork_bias: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_threads", "max_depth"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("fork_token_id", "child_token_id"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ConfigurationError(f"{name} is {value}; a token id is 0 or more")
        if self.fork_token_id is not None and self.fork_token_id == self.child_token_id:
            raise ConfigurationError(f"fork_token_id and child_token_id are both {self.fork_token_id}; they must differ")
        if self.fork_bias != self.fork_bias or self.fork_bias == float("inf"):
            raise ConfigurationError(f"fork_bias is {self.fork_bias}; it must be a number below infinity")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Build a configuration from the plain ``dict`` that a generation config carries.

        Raises:
            ConfigurationError: if a key is unknown; the message lists the right ones.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigurationError(f"unknown APAR setting {', '.join(unknown)}; the settings are {', '.join(known)}")
        return cls(**values)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, int | float | None]:
        """Return a plain ``dict`` that JSON can hold."""
        return asdict(self)

    def filled_from(self, checkpoint: "AparConfig") -> "AparConfig":
        """Return this configuration with its token ids, where they are ``None``, taken from ``checkpoint``."""
        return replace(
            self,
            fork_token_id=checkpoint.fork_token_id if self.fork_token_id is None else self.fork_token_id,
            child_token_id=checkpoint.child_token_id if self.child_token_id is None else self.child_token_id,
        )
