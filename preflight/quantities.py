"""Parse quantities, durations and booleans in the notations of Kubernetes, Knative and the environment."""

import re

from kubernetes.utils import parse_quantity

TRUE_WORDS = frozenset({"1", "on", "t", "true", "y", "yes"})
FALSE_WORDS = frozenset({"0", "off", "f", "false", "n", "no"})
"""The words, in lower case, that pydantic parses as booleans."""
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


def number(quantity: object) -> float:
    """Return cores, bytes or a count of a Kubernetes quantity: `500m`, `16Gi`, `"1"`.

    Raises:
        ValueError: the value is not a quantity.
    """
    return float(parse_quantity(quantity))


def seconds(duration: object) -> float:
    """Return the seconds of a Go duration: `90s`, `13m`, `1h30m`.

    Raises:
        ValueError: the value is not a duration.
    """
    if not isinstance(duration, str) or not _DURATION.fullmatch(duration):
        raise ValueError(f"{duration!r} is not a duration")
    return sum(float(amount) * _SECONDS[unit] for amount, unit in _PART.findall(duration))


def gib(size_bytes: float) -> str:
    """Format bytes as GiB."""
    return f"{size_bytes / 2**30:.1f} GiB"
