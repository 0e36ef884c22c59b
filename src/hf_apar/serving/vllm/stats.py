"""What vLLM's server tells of each step, kept for admission: a stat logger that vLLM finds by its entry point."""

import time
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from hf_apar.serving.admission import Load, StepTimes

_LONGEST = 2.0  # seconds: two reports further apart than that were no steps in a row

reported: dict[int, "EngineLoad"] = {}
"""By data-parallel rank, what tells how that engine is doing; empty where nothing was reported yet."""


class EngineLoad(StatLoggerBase):  # type: ignore[misc]
    """Remembers the last step's numbers, and learns the time of a step by its width."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.max_running = vllm_config.scheduler_config.max_num_seqs
        self.cache_config = vllm_config.cache_config  # its number of blocks is known once the engine has started
        self.times = StepTimes()
        self.last: tuple[float, int] | None = None  # when a step was reported, and its requests
        self.counts = (0, 0, 0.0)
        reported[engine_index] = self

    @property
    def load(self) -> Load:
        """How the engine was doing at its last step."""
        blocks, size = self.cache_config.num_gpu_blocks or 0, self.cache_config.block_size
        return Load(*self.counts, self.max_running, self.times, size * max(blocks - 1, 0), size)  # one block is vLLM's own

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
        **_: Any,
    ) -> None:
        if scheduler_stats is None:
            return
        running, now = scheduler_stats.num_running_reqs, time.monotonic()
        self.counts = (running, scheduler_stats.num_waiting_reqs, scheduler_stats.kv_cache_usage)
        if self.last is not None and self.last[1] and now - self.last[0] < _LONGEST:
            self.times.add(self.last[1], now - self.last[0])
        self.last = (now, running)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
