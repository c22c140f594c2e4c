"""Findings of checks: a problem of one object and its remedy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Source = Literal[
    "API server",
    "KServe's webhook",
    "KServe's controller",
    "Knative's webhook",
    "scheduler",
    "kubelet",
    "kserve-llm",
]
"""What reports or rejects the problem. The API server and KServe's webhook do so when the overlay is applied, the
others afterwards: Knative's webhook rejects what KServe creates. kserve-llm: our programs, or preflight alone."""
Problems = Iterator[tuple[str, str, Source]]
"""Problems of one object, each with its remedy and source."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem; `problem` and `remedy` are clauses without a final period."""

    where: str
    """The object, Kind/name."""
    problem: str
    remedy: str
    source: Source
    """What would report the problem."""
    severity: Literal["error", "warning"] = "error"
    """An error does not work or is not safe; a warning costs time or money, or marks an unchecked object."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.problem}; {self.remedy}. [{self.source}]"


class CheckError(Exception):
    """No check could run; the message names the cause and the fix."""
