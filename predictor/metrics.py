"""Every Prometheus name that the predictor adds to KServe's own, in one place.

The vocabulary is vLLM's under our prefix, since dashboards and autoscalers know it. All have the label `model_name`;
no label ever takes a value that a client sends.
"""

from collections.abc import Callable

from prometheus_client import Counter, Gauge

PREFIX = "kserve_llm_"

_FINISHED = Counter(PREFIX + "request_finished", "Sequences that ended, by reason.", ["model_name", "finished_reason"])
_REJECTED = Counter(PREFIX + "request_rejected", "Requests refused for want of room.", ["model_name"])
_PROMPT_TOKENS = Counter(PREFIX + "prompt_tokens", "Tokens of prompts whose sequence ended.", ["model_name"])
_GENERATION_TOKENS = Counter(PREFIX + "generation_tokens", "Tokens generated.", ["model_name"])

_GAUGES = {
    name: Gauge(PREFIX + name, text, ["model_name"])
    for name, text in {
        "num_requests_running": "Sequences in the batch.",
        "num_requests_waiting": "Sequences that wait for a place in the batch.",
        "kv_cache_usage_perc": "Share of the KV cache that running sequences hold, 0 to 1.",
        "kv_cache_capacity_tokens": "Tokens that the KV cache holds at most.",
        "engine_steps": "Steps of the engine since its start.",
        "self_check_age_seconds": "Time since the model was last seen to generate.",
    }.items()
}


def watch(model_name: str, **values: Callable[[], float]) -> None:
    """Ask for these gauges, by their names without prefix, at every scrape."""
    for name, value in values.items():
        _GAUGES[name].labels(model_name).set_function(value)


def count_finished(model_name: str, reason: str, prompt_tokens: int, generation_tokens: int) -> None:
    """A sequence ended: by a finish reason, or cancelled, by its deadline, or failed."""
    _FINISHED.labels(model_name, reason).inc()
    _PROMPT_TOKENS.labels(model_name).inc(prompt_tokens)
    _GENERATION_TOKENS.labels(model_name).inc(generation_tokens)


def count_rejected(model_name: str) -> None:
    """A request was refused with 429."""
    _REJECTED.labels(model_name).inc()
