"""Exceptions: each is an :class:`AparError` and the built-in that fits, so that callers may catch either."""


def lacks_memory(error: BaseException) -> bool:
    """Is it what Python or PyTorch raises where memory is short? PyTorch has no class for that of a CPU."""
    name = type(error).__name__
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error)


class AparError(Exception):
    """Base of all errors that hf_apar raises itself."""


class ControlTokenError(AparError, ValueError):
    """The [Fork] and [Child] tokens are missing, unknown or where they must not be."""


class ConfigurationError(AparError, ValueError):
    """A setting that APAR decoding does not know, or cannot follow."""


class UnsupportedModelError(AparError, ValueError):
    """A model or cache whose layers cannot attend along a tree."""


class CheckpointError(AparError, OSError):
    """A checkpoint, an adapter or its base that is not where it was looked for."""


class DataError(AparError, ValueError):
    """A record or file that cannot be used for training."""


class MissingPackageError(AparError, ImportError):
    """An optional package that is asked for and not installed."""


class ServerError(AparError, RuntimeError):
    """A server that this package started does not answer."""
