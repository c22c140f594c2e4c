"""Records of published snapshots: create them, and read them with this program's errors."""

import datetime
from pathlib import Path

from snapshot_format import record
from snapshot_format.record import (
    FORMAT_VERSION,
    RECORD,
    File,
    FileSelection,
    InvalidRecord,
    QuantizationRecipe,
    Record,
    UnsupportedFormatVersion,
)
from storage_initializer.errors import RefusedVolume


def make(
    reference: str,
    commit: str,
    files: tuple[File, ...],
    selection: FileSelection,
    seconds: float,
    recipe: QuantizationRecipe | None = None,
) -> Record:
    """Return the record of a snapshot that is published now; `seconds` is the duration of the work."""
    # Imported here because it takes longer than checking a published snapshot.
    import importlib.metadata

    return Record(
        reference=reference,
        commit=commit,
        files=files,
        selection=selection,
        recipe=recipe,
        tool=f"kserve-llm {importlib.metadata.version('kserve-llm')}",
        published_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        duration_seconds=round(seconds, 3),
    )


def read(snapshot: Path) -> Record:
    """Read the record of a published snapshot.

    Raises:
        RefusedVolume: the record is missing, unreadable, or of another format version.
    """
    try:
        return record.read(snapshot)
    except UnsupportedFormatVersion as error:
        raise RefusedVolume(
            f"{snapshot / RECORD} has format version {error.version}, and this program reads {FORMAT_VERSION}. "
            "Use the version of the program that published it."
        ) from error
    except (FileNotFoundError, NotADirectoryError, InvalidRecord) as error:
        raise RefusedVolume(
            f"{snapshot} has no readable {RECORD}, so its content is unknown. Remove it and run again."
        ) from error
