"""vLLM's own metrics, counted in this process and told as Prometheus text when somebody asks."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Metric, disable_created_metrics, generate_latest
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import PrometheusStatLogger

PREFIX = "vllm:"


class VllmMetrics(PrometheusStatLogger):  # type: ignore[misc]
    """vLLM's Prometheus logger, which is called after every step.

    Of `vllm:lora_requests_info` it keeps the newest sample only. Its labels list the adapters that run and wait, so
    vLLM makes one more for every combination that ever was: memory, and a page, that grow as adapters come and go.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the workers' metrics have no such lines either
        super().__init__(*arguments, **options)
        self._adapters: tuple[list[str], list[str]] = ([], [])

    def record(self, scheduler_stats: Any, iteration_stats: Any, *arguments: Any, **options: Any) -> None:
        if scheduler_stats is not None and self.gauge_lora_info is not None:
            adapters = list(scheduler_stats.running_lora_adapters), list(scheduler_stats.waiting_lora_adapters)
            if adapters != self._adapters:
                self._adapters = adapters
                self.gauge_lora_info.clear()
        super().record(scheduler_stats, iteration_stats, *arguments, **options)


class _Own(Collector):
    def collect(self) -> Iterator[Metric]:
        yield from (metric for metric in REGISTRY.collect() if metric.name.startswith(PREFIX))


def exposition() -> str:
    registry = CollectorRegistry()
    registry.register(_Own())
    return generate_latest(registry).decode()
