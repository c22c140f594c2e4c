"""Prometheus metrics that the predictor adds to KServe's.

The names are vLLM's with our prefix, so that dashboards and autoscalers carry over; docs/how-to/monitoring.md has the
mapping. All metrics have the label `model_name`. Label values come from fixed sets, never from clients.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from predictor.types import FinishedSequence

PREFIX = "kserve_llm_"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Buckets for latencies from one step to a whole request."""
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets for the time between two tokens."""

PROTOCOLS = frozenset(
    {"v1", "v2", "generate", "generate_stream", "openai", "anthropic", "rerank", "score", "tokenize", "grpc"}
)
OTHER = "other"
"""Protocol of a request that was rejected before its route, or has none."""

MODEL_PROPERTIES = ("commit", "adapter", "device", "dtype", "quantization", "tensor_parallel_size")
"""Labels of `model_info`, named as in the model's metadata."""

_FINISHED = Counter(
    PREFIX + "request_finished", "Finished sequences, by finish reason.", ["model_name", "finished_reason"]
)
_REQUESTS = Counter(
    PREFIX + "requests",
    "Responses, by protocol and HTTP status; gRPC codes as the status of the same error.",
    ["model_name", "protocol", "status"],
)
_INFO = Gauge(
    PREFIX + "model_info",
    "Properties of the served model as labels; the value is 1.",
    ["model_name", *MODEL_PROPERTIES],
)
_PHASES = Gauge(PREFIX + "load_phase_seconds", "Duration of a finished phase of startup.", ["model_name", "phase"])
_COUNTERS = {
    name: Counter(PREFIX + name, text, ["model_name"])
    for name, text in {
        "request_rejected": "Requests rejected because the queue was full.",
        "prompt_tokens": "Prompt tokens of finished sequences.",
        "generation_tokens": "Generated tokens of answers, up to their stop strings.",
    }.items()
}
_HISTOGRAMS = {
    name: Histogram(PREFIX + name, text, ["model_name"], buckets=buckets)
    for name, text, buckets in (
        ("time_to_first_token_seconds", "Time from the admission of a sequence to its first token.", SECONDS),
        ("inter_token_latency_seconds", "Time between two tokens of a sequence.", GAP_SECONDS),
        ("e2e_request_latency_seconds", "Time from the admission of a sequence to its end.", SECONDS),
        ("request_queue_time_seconds", "Time from the admission of a sequence to its first step.", SECONDS),
        ("request_prefill_time_seconds", "Time from the first step of a sequence to its first token.", SECONDS),
    )
}


class CallbackCollector(Collector):
    """Metrics whose values are read by callbacks at every scrape."""

    texts = {  # noqa: RUF012, a constant
        "num_requests_running": "Sequences in the batch.",
        "num_requests_waiting": "Queued sequences.",
        "kv_cache_usage_perc": "Fraction of the KV cache used by running sequences, 0 to 1.",
        "kv_cache_capacity_tokens": "Capacity of the KV cache in tokens.",
        "engine_steps": "Steps of the engine since its start.",
        "engine_failed_steps": "Steps that failed, with their sequences or the newest one.",
        "spec_decode_num_drafts": "Steps of a sequence with guessed tokens.",
        "spec_decode_num_draft_tokens": "Guessed tokens that were verified.",
        "spec_decode_num_accepted_tokens": "Guessed tokens that were right.",
        "self_check_age_seconds": "Time since the self-check last succeeded.",
        "self_check_success": "Whether the last self-check succeeded, 1 or 0.",
        "ready": "Whether the model is ready, 1 or 0.",
        "live": "Whether the step loop makes progress, or has not started yet, 1 or 0.",
    }

    def __init__(self) -> None:
        self.callbacks: dict[str, dict[str, Callable[[], float]]] = {name: {} for name in self.texts}
        """By metric and model name."""

    def collect(self) -> Iterator[Metric]:
        """Yield one metric family for each name."""
        for name, text in self.texts.items():
            is_count = name.endswith("_steps") or name.startswith("spec_decode_")
            kind = CounterMetricFamily if is_count else GaugeMetricFamily
            family = kind(PREFIX + name, text, labels=["model_name"])
            for model_name, callback in list(self.callbacks[name].items()):
                family.add_metric([model_name], float(callback()))
            yield family


_CALLBACKS = CallbackCollector()
REGISTRY.register(_CALLBACKS)


class ModelMetrics:
    """The metrics of one model, by its name."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        # Labels are resolved once, not for every token.
        self._counters = {name: counter.labels(model_name) for name, counter in _COUNTERS.items()}
        self._histograms = {name: histogram.labels(model_name) for name, histogram in _HISTOGRAMS.items()}

    def register_callbacks(self, **callbacks: Callable[[], float]) -> None:
        """Read these metrics, named without prefix, by callback at every scrape."""
        for name, callback in callbacks.items():
            _CALLBACKS.callbacks[name][self._model_name] = callback

    def set_model_info(self, properties: Mapping[str, str]) -> None:
        """Set the labels of `model_info`; a missing property is empty."""
        _INFO.labels(self._model_name, *(properties.get(name, "") for name in MODEL_PROPERTIES)).set(1)

    def observe_load_phase(self, phase: str, seconds: float) -> None:
        """Record the duration of a phase of startup."""
        _PHASES.labels(self._model_name, phase).set(seconds)

    @contextmanager
    def time_load_phase(self, phase: str) -> Iterator[None]:
        """Record the duration of the block, unless it fails."""
        started = time.monotonic()
        yield
        self.observe_load_phase(phase, time.monotonic() - started)

    def count_tokens(self, tokens: int, gap_seconds: float | None) -> None:
        """Count new tokens of a sequence, `gap_seconds` after its previous ones; None for its first."""
        self._counters["generation_tokens"].inc(tokens)
        if gap_seconds is not None:
            gap = self._histograms["inter_token_latency_seconds"]
            for _ in range(tokens):
                gap.observe(gap_seconds / tokens)

    def count_finished(self, sequence: FinishedSequence) -> None:
        """Count a finished sequence, by its outcome, and observe its latencies."""
        _FINISHED.labels(self._model_name, sequence.outcome).inc()
        self._counters["prompt_tokens"].inc(sequence.prompt_tokens)
        self._histograms["e2e_request_latency_seconds"].observe(sequence.total_seconds)
        queue, first_token = sequence.queue_seconds, sequence.first_token_seconds
        if queue is not None:
            self._histograms["request_queue_time_seconds"].observe(queue)
        if first_token is not None:
            self._histograms["time_to_first_token_seconds"].observe(first_token)
        if queue is not None and first_token is not None:
            self._histograms["request_prefill_time_seconds"].observe(first_token - queue)

    def count_rejected(self) -> None:
        """Count a request rejected with 429."""
        self._counters["request_rejected"].inc()

    def count_request(self, protocol: str | None, status: int) -> None:
        """Count a response, or a client that disconnected; probes are not counted."""
        _REQUESTS.labels(self._model_name, protocol if protocol in PROTOCOLS else OTHER, str(status)).inc()
