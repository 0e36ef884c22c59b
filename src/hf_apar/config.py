"""The settings of APAR decoding."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

from hf_apar.errors import ConfigurationError

MAX_THREADS = 32  # live threads of one row, where nothing else is said


@dataclass(frozen=True, kw_only=True)
class AparConfig:
    """How a model forks. What is ``None`` is taken from the checkpoint, or else is the default named here.

    Attributes:
        fork_token_id: id of [Fork], the token that a model emits to start a thread (paper, section 3.1).
        child_token_id: id of [Child], the token that is injected as a new thread's first.
        max_threads: live threads of one row, 32; a fork beyond that happens, its child waits. At least 1.
        max_depth: deepest thread that may exist, 3; the root has depth 1, so 1 forbids forks. At least 1.
        fork_bias: added to the logit of [Fork], 0.0, a knob against missed forks; ``-inf`` forbids forks.
        joint: text between two segments of an answer where neither has a space, "": a line break for the paper's own
            checkpoints, which learnt to write titles and details without it.

    Raises:
        ConfigurationError: if a value is out of its range.

    >>> AparConfig(max_threads=8).to_dict()
    {'max_threads': 8}
    """

    fork_token_id: int | None = None
    child_token_id: int | None = None
    max_threads: int | None = None
    max_depth: int | None = None
    fork_bias: float | None = None
    joint: str | None = None

    def __post_init__(self) -> None:
        whole = {"max_threads": 1, "max_depth": 1, "fork_token_id": 0, "child_token_id": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigurationError(f"{name} is {value!r}; it must be a whole number of {least} or more")
        if self.fork_token_id is not None and self.fork_token_id == self.child_token_id:
            raise ConfigurationError(f"fork_token_id and child_token_id are both {self.fork_token_id}, and must differ")
        bias = self.fork_bias
        if bias is not None and (isinstance(bias, bool) or not isinstance(bias, int | float) or not bias < float("inf")):
            raise ConfigurationError(f"fork_bias is {bias!r}; it must be a number below infinity")  # NaN is not below it
        if not isinstance(self.joint, str | None):
            raise ConfigurationError(f"joint is {self.joint!r}; it must be a text, such as a line break")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Build a configuration from the plain ``dict`` that a generation config carries.

        Raises:
            ConfigurationError: if a key is unknown, the message lists the right ones, or a value is of another kind.
        """
        if not isinstance(values, Mapping):
            raise ConfigurationError(f"APAR settings are {str(values)[:80]!r}; they must be a dict")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(name)[:40] for name in values if name not in known):
            raise ConfigurationError(f"unknown APAR setting {', '.join(unknown)}; the settings are {', '.join(known)}")
        return cls(**values)  # type: ignore[arg-type]

    @property
    def control_ids(self) -> tuple[int, int] | None:
        """The ids of [Fork] and [Child], ``None`` unless both are known."""
        if self.fork_token_id is None or self.child_token_id is None:
            return None
        return self.fork_token_id, self.child_token_id

    def to_dict(self) -> dict[str, int | float | str]:
        """Return what is set, as a plain ``dict`` that JSON can hold."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def filled_from(self, checkpoint: "AparConfig") -> "AparConfig":
        """Return this configuration with what is ``None`` taken from ``checkpoint``."""
        return AparConfig.from_dict(checkpoint.to_dict() | self.to_dict())
