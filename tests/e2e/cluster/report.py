"""The report: one line per phase, with its duration and what was wrong."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.e2e.cluster.kubectl import ClusterError


@dataclass(slots=True)
class Phase:
    """One line."""

    mode: str
    name: str
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    note: str = ""


class Report:
    """Collects phases, and prints each one when it ends."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []

    @property
    def failed(self) -> bool:
        """Whether any phase has an error, or none was run."""
        return not self.phases or any(phase.errors for phase in self.phases)

    @contextmanager
    def phase(self, mode: str, name: str) -> Iterator[Phase]:
        """Measure a phase; an error that ends it is in the report as well."""
        phase, started = Phase(mode, name), time.monotonic()
        try:
            yield phase
        except ClusterError as error:
            phase.errors.append(str(error))
            raise
        finally:
            phase.seconds = time.monotonic() - started
            self.add(phase)

    def add(self, phase: Phase) -> None:
        """Add a phase that was measured elsewhere."""
        self.phases.append(phase)
        result = "FAILED" if phase.errors else "ok"
        print(f"{phase.mode:9} {phase.name:28} {phase.seconds:8.1f} s  {result}  {phase.note}".rstrip(), flush=True)
        for error in phase.errors:
            print(f"{'':10}{error}", flush=True)
