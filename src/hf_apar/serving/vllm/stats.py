"""What vLLM's server tells of each step, kept for admission: a stat logger that vLLM finds by its entry point."""

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from hf_apar.serving.admission import Load
from hf_apar.serving.vllm.engine import load_of

reported: dict[int, "EngineLoad"] = {}
"""By data-parallel rank, what tells how that engine is doing; empty where nothing was reported yet."""


class EngineLoad(StatLoggerBase):  # type: ignore[misc]
    """Remembers the last step's numbers."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._config = vllm_config
        self._last = (0, 0, 0.0)
        reported[engine_index] = self

    @property
    def load(self) -> Load:
        """How the engine was doing at its last step."""
        return load_of(self._config, *self._last)

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
