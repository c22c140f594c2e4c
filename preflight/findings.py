"""Findings of checks: a problem of one object and its remedy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

ProblemsAndRemedies = Iterator[tuple[str, str]]
"""Problems of one object, each with its remedy."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem; `problem` and `remedy` are clauses without a final period."""

    where: str
    """The object, Kind/name."""
    problem: str
    remedy: str
    severity: Literal["error", "warning"] = "error"
    """An error does not work or is not safe; a warning costs time or money, or marks an unchecked object."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.problem}; {self.remedy}."


class CheckError(Exception):
    """No check could run; the message names the cause and the fix."""
