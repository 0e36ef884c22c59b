"""What vLLM's server tells of each step, kept for admission: a stat logger that vLLM finds by its entry point."""

import time
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from vllm.v1.metrics.loggers import StatLoggerBase

from hf_apar.serving.admission import Load, StepCost
from hf_apar.serving.costs import StepCosts
from hf_apar.serving.vllm.engine import load_of

_FITTED_EACH = 16  # steps
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
        self._costs = StepCosts()
        self._cost: StepCost | None = None
        self._at: float | None = None  # when the step before was told, if the engine was at work then
        _loggers.add(self)

    @property
    def load(self) -> Load:
        """How the engine was doing at its last step."""
        return replace(load_of(self.config, *self._last), cost=self._cost)

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
            if iteration_stats is not None:
                self._note(stats.num_running_reqs, iteration_stats.prompt_token_stats.computed)

    def _note(self, requests: int, prompt_tokens: int) -> None:
        now = time.monotonic()
        if self._at is not None:
            self._costs.add(now - self._at, requests, prompt_tokens)
            if self._costs.steps % _FITTED_EACH == 0:
                self._cost = self._costs.fitted()
        self._at = now if requests else None  # else the time until the next step is not of the engine's making

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
