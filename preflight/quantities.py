"""Amounts as Kubernetes and Knative write them."""

import re

from kubernetes.utils import parse_quantity

_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


def number(quantity: object) -> float:
    """Cores, bytes or pieces, of `500m`, `16Gi`, `"1"`.

    Raises:
        ValueError: it is no quantity.
    """
    return float(parse_quantity(quantity))  # type: ignore[no-untyped-call]


def seconds(duration: object) -> float:
    """Seconds of Go's way to write them: `90s`, `13m`, `1h30m`.

    Raises:
        ValueError: it is no duration.
    """
    if not isinstance(duration, str) or not _DURATION.fullmatch(duration):
        raise ValueError(f"{duration!r} is not a duration")
    return sum(float(amount) * _SECONDS[unit] for amount, unit in _PART.findall(duration))


def gib(size_bytes: float) -> str:
    """Bytes for people to read."""
    return f"{size_bytes / 2**30:.1f} GiB"
