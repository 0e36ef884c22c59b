"""What vLLM's server tells of each step, kept for admission: a stat logger that vLLM finds by its entry point."""

from typing import Any
from weakref import WeakSet

from vllm.v1.metrics.loggers import StatLoggerBase

from hf_apar.serving.admission import Load
from hf_apar.serving.vllm.engine import load_of

_loggers: "WeakSet[EngineLoad]" = WeakSet()  # each engine of this process keeps its own


def reported(vllm_config: Any, rank: int) -> Load | None:
    """Return how a data-parallel rank of the engine of ``vllm_config`` was doing at its last step, if that was told."""
    found = (one.load for one in _loggers if one.config is vllm_config and one.rank == rank)
    return next(found, None)


class EngineLoad(StatLoggerBase):  # type: ignore[misc]
    """Remembers the last step's numbers."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.config, self.rank = vllm_config, engine_index
        self._last = (0, 0, 0.0)
        _loggers.add(self)

    @property
    def load(self) -> Load:
        """How the engine was doing at its last step."""
        return load_of(self.config, *self._last)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
        **_: Any,
    ) -> None:
        if scheduler_stats is not None:
            stats = scheduler_stats
            self._last = (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
