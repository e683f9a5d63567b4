"""What Prometheus sees. In multiprocess mode every worker writes to shared files and any worker answers for all.

Labels are bounded: routes by their template, models by the ids this server serves, outcomes by error codes.
"""

import time
from collections.abc import Iterator
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.values import ValueClass

from server.engine.messages import EngineStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Not the library's global one: Gunicorn's master imports this module again at every reload.
PROCESS_REGISTRY = CollectorRegistry()
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

http_requests = Counter(
    "qloop_http_requests", "Answered HTTP requests.", ["method", "route", "code"], registry=PROCESS_REGISTRY
)
answers = Counter(
    "qloop_answers",
    "Ended generations; outcome is ok, cancelled or an error code.",
    ["endpoint", "model", "outcome"],
    registry=PROCESS_REGISTRY,
)
prompt_tokens = Counter(
    "qloop_prompt_tokens", "Prompt tokens of ended generations.", ["model"], registry=PROCESS_REGISTRY
)
generated_tokens = Counter(
    "qloop_generated_tokens", "Generated tokens of ended generations.", ["model"], registry=PROCESS_REGISTRY
)
first_token_s = Histogram(
    "qloop_time_to_first_token_seconds",
    "From the request's arrival to its first output.",
    ["model"],
    buckets=_SECONDS,
    registry=PROCESS_REGISTRY,
)
answer_s = Histogram(
    "qloop_answer_seconds",
    "From the request's arrival to its end.",
    ["model"],
    buckets=_SECONDS,
    registry=PROCESS_REGISTRY,
)
_MODE: Final = "livemostrecent"
engine_ready = Gauge(
    "qloop_engine_ready",
    "1 while the engine answers and takes requests.",
    multiprocess_mode=_MODE,
    registry=PROCESS_REGISTRY,
)
sequences_running = Gauge(
    "qloop_sequences_running", "Sequences being computed.", multiprocess_mode=_MODE, registry=PROCESS_REGISTRY
)
sequences_waiting = Gauge(
    "qloop_sequences_waiting", "Sequences in the queue.", multiprocess_mode=_MODE, registry=PROCESS_REGISTRY
)
kv_tokens_used = Gauge(
    "qloop_kv_tokens_used",
    "Tokens of KV memory in use or reserved.",
    multiprocess_mode=_MODE,
    registry=PROCESS_REGISTRY,
)
kv_tokens_total = Gauge(
    "qloop_kv_tokens_total", "Tokens of KV memory there are.", multiprocess_mode=_MODE, registry=PROCESS_REGISTRY
)

adapters_loaded = Gauge(
    "qloop_adapters_loaded",
    "Adapters with weights in the engine's memory.",
    multiprocess_mode=_MODE,
    registry=PROCESS_REGISTRY,
)
adapters_served = Gauge(
    "qloop_adapters_served",
    "Adapter revisions that a request may name.",
    multiprocess_mode=_MODE,
    registry=PROCESS_REGISTRY,
)


class EngineCounters(Collector):
    """What the engine counts itself. Every worker hears the same totals, so the scraped one's are the service's."""

    def __init__(self, stats: EngineStats) -> None:
        self.stats = stats

    def collect(self) -> Iterator[CounterMetricFamily]:
        """They begin anew when the engine does, as Prometheus expects of counters."""
        yield CounterMetricFamily(
            "qloop_cached_tokens", "Prompt tokens that a kept prefix saved.", value=self.stats.cached_tokens_total
        )
        yield CounterMetricFamily(
            "qloop_preemptions",
            "Sequences put back into the queue when memory ran out.",
            value=self.stats.num_preempted,
        )
        yield CounterMetricFamily(
            "qloop_adapter_evictions",
            "Times an adapter's weights made room for another's.",
            value=self.stats.num_evicted,
        )


def exposition(stats: EngineStats) -> bytes:
    """Prometheus text for the whole service, whichever worker is asked."""
    registry = CollectorRegistry()
    if ValueClass.__name__ == "MmapedValue":
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    else:
        registry.register(PROCESS_REGISTRY)
    registry.register(EngineCounters(stats))
    return generate_latest(registry)


def observe_engine(stats: EngineStats, is_ready: bool, num_adapters_served: int) -> None:
    """Take over the engine's own numbers; called when scraped, so the newest value is the scraped worker's."""
    engine_ready.set(is_ready)
    sequences_running.set(stats.num_running)
    sequences_waiting.set(stats.num_waiting)
    kv_tokens_used.set(stats.kv_tokens_used)
    kv_tokens_total.set(stats.kv_tokens_total)
    adapters_loaded.set(stats.num_adapters)
    adapters_served.set(num_adapters_served)


class AnswerTimer:
    """Times one generation and counts it when it ends."""

    def __init__(self, endpoint: str, model: str) -> None:
        self.outcome = "ok"
        self._endpoint = endpoint
        self._model = model
        self._start = time.perf_counter()
        self._has_output = False

    def saw_output(self) -> None:
        if not self._has_output:
            self._has_output = True
            first_token_s.labels(self._model).observe(time.perf_counter() - self._start)

    def finish(self, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        answers.labels(self._endpoint, self._model, self.outcome).inc()
        answer_s.labels(self._model).observe(time.perf_counter() - self._start)
        prompt_tokens.labels(self._model).inc(num_prompt_tokens)
        generated_tokens.labels(self._model).inc(num_generated_tokens)
