"""The last error of the storage initializer for a reference, at `layout.status_path`.

    {"error": "Repository hf://demo/arithmetic does not exist. …", "failed_at": "2026-11-24T04:00:13Z"}

The storage initializer replaces it when it fails and removes it when it has published the reference. The predictor
repeats it while it waits.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

MAX_CHARACTERS = 2000
"""Longest error that is stored and repeated."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the storage initializer could not publish a reference."""

    error: str
    """One line without secrets."""
    failed_at: str
    """Time in UTC, by ISO 8601."""

    def to_json(self) -> str:
        """Return the content of the file."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return f"the storage initializer failed at {self.failed_at}: {self.error}"


def read(path: Path) -> Failure | None:
    """Read a status file; None if there is none, or not yet a complete one.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        fields = json.loads(path.read_text())
        return Failure(" ".join(str(fields["error"]).split())[:MAX_CHARACTERS], str(fields["failed_at"])[:40])
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return None
