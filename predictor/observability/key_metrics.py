"""Prometheus metrics by name of the API key.

The names are those of the operator's file, and never keys. Names beyond `MAX_NAMES` in the life of a process, as of a
file that is generated anew all the time, are counted together.
"""

from prometheus_client import Counter, Gauge, Summary

from predictor.observability.metrics import OTHER, PREFIX
from predictor.types import FinishedSequence

MAX_NAMES = 100

_LABELS = ("model_name", "key")
_REQUESTS = Counter(PREFIX + "key_requests", "Requests accepted, by name of the API key.", _LABELS)
_REJECTED = Counter(
    PREFIX + "key_request_rejected",
    "Requests rejected with 429, by name of the API key and limit.",
    (*_LABELS, "limit"),
)
_PROMPT_TOKENS = Counter(PREFIX + "key_prompt_tokens", "Prompt tokens of finished sequences, by API key.", _LABELS)
_GENERATION_TOKENS = Counter(PREFIX + "key_generation_tokens", "Generated tokens, by name of the API key.", _LABELS)
_SEQUENCES = Gauge(PREFIX + "key_num_sequences", "Sequences that run or wait, by name of the API key.", _LABELS)
_QUEUE_TIME = Summary(
    PREFIX + "key_queue_time_seconds",
    "Time from the admission of a sequence to its first step, by name of the API key.",
    _LABELS,
)


class KeyMetrics:
    """The metrics of one model by key."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._names: set[str] = set()

    def count_accepted(self, name: str, sequences: int) -> None:
        """Count a request, whose sequences run or wait from now on."""
        labels = self._labels(name)
        _REQUESTS.labels(*labels).inc()
        _SEQUENCES.labels(*labels).inc(sequences)

    def count_rejected(self, name: str, limit: str) -> None:
        """Count a request rejected with 429; `limit` is one of a fixed set."""
        _REJECTED.labels(*self._labels(name), limit).inc()

    def count_tokens(self, name: str, tokens: int) -> None:
        """Count generated tokens."""
        _GENERATION_TOKENS.labels(*self._labels(name)).inc(tokens)

    def count_finished(self, name: str, sequence: FinishedSequence) -> None:
        """Count a sequence that has ended."""
        labels = self._labels(name)
        _SEQUENCES.labels(*labels).dec()
        _PROMPT_TOKENS.labels(*labels).inc(sequence.prompt_tokens)
        if sequence.queue_seconds is not None:
            _QUEUE_TIME.labels(*labels).observe(sequence.queue_seconds)

    def _labels(self, name: str) -> tuple[str, str]:
        if len(self._names) < MAX_NAMES:
            self._names.add(name)
        return self._model_name, name if name in self._names else OTHER
