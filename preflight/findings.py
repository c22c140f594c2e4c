"""What a check has to say: one problem of one object, and what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Clauses = Iterator[tuple[str, str]]
"""Problems and remedies of one object."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem; `problem` and `remedy` are clauses that make one sentence."""

    where: str
    """The object, Kind/name."""
    problem: str
    remedy: str
    severity: Literal["error", "warning"] = "error"
    """A warning costs time or money; an error does not work, or not safely."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.problem}; {self.remedy}."


class CannotLook(Exception):
    """Nothing could be checked at all; the message is one sentence with the remedy."""
