"""What vLLM's scheduler says of itself after every step; also the pulse by which a hung engine is noticed."""

import time
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


@dataclass(slots=True)
class Progress:
    """Numbers of all engine cores together; one core unless data_parallel_size is above 1."""

    num_steps: int = 0
    num_preempted: int = 0
    last_step: float = field(default_factory=time.monotonic)
    running: dict[int, int] = field(default_factory=dict)  # sequences by engine core
    kv_usage: dict[int, float] = field(default_factory=dict)  # share of the blocks in use, by engine core

    @property
    def num_running(self) -> int:
        return sum(self.running.values())

    @property
    def mean_kv_usage(self) -> float:
        return sum(self.kv_usage.values()) / max(len(self.kv_usage), 1)


class ProgressLogger(StatLoggerBase):  # type: ignore[misc]
    """vLLM calls `record` after each step of the engine core `index`."""

    def __init__(self, progress: Progress, index: int) -> None:
        self._progress = progress
        self._index = index

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        progress = self._progress
        progress.last_step = time.monotonic()
        if scheduler_stats is not None:
            progress.num_steps += 1
            progress.running[self._index] = scheduler_stats.num_running_reqs
            progress.kv_usage[self._index] = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            progress.num_preempted += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
