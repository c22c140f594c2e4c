"""Every Prometheus name that the predictor adds to KServe's own, in one place.

The vocabulary is vLLM's under our prefix, since dashboards and autoscalers know it; the README has the mapping. All
have the label `model_name`, and the values of every label come from sets that are known when the server starts: none is
ever what a client sends.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from predictor.types import FinishedSequence

PREFIX = "kserve_llm_"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Buckets for what takes from a step to a whole request: an LLM's go to minutes."""
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets for what lies between two tokens."""

PROTOCOLS = frozenset({"v1", "v2", "generate", "generate_stream", "openai", "grpc"})
OTHER = "other"
"""Protocol of a request that reached none: refused before its route, or for a path that is not served."""

_FINISHED = Counter(PREFIX + "request_finished", "Sequences that ended, by reason.", ["model_name", "finished_reason"])
_REQUESTS = Counter(
    PREFIX + "requests",
    "Requests answered, by protocol and HTTP status; gRPC's codes as the status of the same error.",
    ["model_name", "protocol", "status"],
)
_INFO = Gauge(
    PREFIX + "model_info",
    "1, with what is served in its labels.",
    ["model_name", "commit", "device", "dtype", "quantization"],
)
_PHASES = Gauge(
    PREFIX + "load_phase_seconds", "How long a phase of the start took, once it is over.", ["model_name", "phase"]
)
_COUNTERS = {
    name: Counter(PREFIX + name, text, ["model_name"])
    for name, text in {
        "request_rejected": "Requests refused for want of room.",
        "prompt_tokens": "Tokens of prompts whose sequence ended.",
        "generation_tokens": "Tokens generated.",
    }.items()
}
_HISTOGRAMS = {
    name: Histogram(PREFIX + name, text, ["model_name"], buckets=buckets)
    for name, text, buckets in (
        ("time_to_first_token_seconds", "From the admission of a sequence to its first token.", SECONDS),
        ("inter_token_latency_seconds", "From one token of a sequence to its next.", GAP_SECONDS),
        ("e2e_request_latency_seconds", "From the admission of a sequence to its end, in whatever way.", SECONDS),
        ("request_queue_time_seconds", "From the admission of a sequence to its first step.", SECONDS),
        ("request_prefill_time_seconds", "From the first step of a sequence to its first token.", SECONDS),
    )
}


class CallbackCollector(Collector):
    """Numbers that somebody else keeps, asked for at every scrape, by metric and model."""

    texts = {  # noqa: RUF012, a constant
        "num_requests_running": "Sequences in the batch.",
        "num_requests_waiting": "Sequences that wait for a place in the batch.",
        "kv_cache_usage_perc": "Share of the KV cache that running sequences hold, 0 to 1.",
        "kv_cache_capacity_tokens": "Tokens that the KV cache holds at most.",
        "engine_steps": "Steps of the engine since its start.",
        "self_check_age_seconds": "Time since the model was last seen to generate.",
        "self_check_success": "Whether the last self-check succeeded, or work made it needless, 1 or 0.",
        "ready": "Whether a request would be answered now, 1 or 0.",
        "live": "Whether the step loop makes progress, or has not been started yet, 1 or 0.",
    }

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Callable[[], float]]] = {name: {} for name in self.texts}

    def collect(self) -> Iterator[Metric]:
        """One family for each name."""
        for name, text in self.texts.items():
            kind = CounterMetricFamily if name == "engine_steps" else GaugeMetricFamily
            family = kind(PREFIX + name, text, labels=["model_name"])
            for model_name, value in list(self.values[name].items()):
                family.add_metric([model_name], float(value()))
            yield family


_CALLBACKS = CallbackCollector()
REGISTRY.register(_CALLBACKS)


class ModelMetrics:
    """The metrics of one model.

    Args:
        model_name: the label `model_name` of all.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        # Looked up once: a token is not the place to look up labels.
        self._counters = {name: counter.labels(model_name) for name, counter in _COUNTERS.items()}
        self._histograms = {name: histogram.labels(model_name) for name, histogram in _HISTOGRAMS.items()}
        self._generated = self._counters["generation_tokens"]
        self._gap = self._histograms["inter_token_latency_seconds"]

    def register_callbacks(self, **values: Callable[[], float]) -> None:
        """Ask for these, by their names without prefix, at every scrape."""
        for name, value in values.items():
            _CALLBACKS.values[name][self._model_name] = value

    def set_model_info(self, *, commit: str, device: str, dtype: str, quantization: str) -> None:
        """What is served."""
        _INFO.labels(self._model_name, commit, device, dtype, quantization).set(1)

    def observe_load_phase(self, phase: str, seconds: float) -> None:
        """A phase of the start is over: a constant of the code, as every label is."""
        _PHASES.labels(self._model_name, phase).set(seconds)

    @contextmanager
    def time_load_phase(self, phase: str) -> Iterator[None]:
        """Tell how long the block took, unless it fails."""
        began = time.monotonic()
        yield
        self.observe_load_phase(phase, time.monotonic() - began)

    def count_tokens(self, tokens: int, gap_seconds: float | None) -> None:
        """A sequence has so many more tokens; `gap_seconds` after those before, None for the first."""
        self._generated.inc(tokens)
        if gap_seconds is not None:
            for _ in range(tokens):
                self._gap.observe(gap_seconds / tokens)

    def count_finished(self, sequence: FinishedSequence) -> None:
        """Count a sequence that ended, by its outcome, and observe its latencies."""
        _FINISHED.labels(self._model_name, sequence.outcome).inc()
        self._counters["prompt_tokens"].inc(sequence.prompt_tokens)
        self._histograms["e2e_request_latency_seconds"].observe(sequence.total_seconds)
        queue, first_token = sequence.queue_seconds, sequence.first_token_seconds
        if queue is not None:
            self._histograms["request_queue_time_seconds"].observe(queue)
            if first_token is not None:
                self._histograms["request_prefill_time_seconds"].observe(first_token - queue)
        if first_token is not None:
            self._histograms["time_to_first_token_seconds"].observe(first_token)

    def count_rejected(self) -> None:
        """A request was refused with 429."""
        self._counters["request_rejected"].inc()

    def count_request(self, protocol: str | None, status: int) -> None:
        """A request was answered, or its client left; not a probe. The status is one of ours, never a client's word."""
        _REQUESTS.labels(self._model_name, protocol if protocol in PROTOCOLS else OTHER, str(status)).inc()
