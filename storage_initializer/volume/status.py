"""The last error of a publication, kept on the volume, where the predictor that waits for the snapshot can read it."""

import contextlib
import datetime
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path

from snapshot_format.failure import MAX_CHARACTERS, Failure
from snapshot_format.layout import status_path
from snapshot_format.reference import ModelReference
from storage_initializer.errors import explain
from storage_initializer.settings import Settings, redact
from storage_initializer.volume import permissions

log = logging.getLogger(__name__)


@contextlib.contextmanager
def kept(reference: ModelReference, root: Path, settings: Settings) -> Iterator[None]:
    """Write an error of the block to the volume, and remove that of an earlier run after success.

    A volume that cannot carry it, because it is full or not writable, is only logged: the error itself matters more.
    """
    path = status_path(root, reference)
    try:
        yield
    except Exception as error:
        if root.is_dir():
            with _logged(path), permissions.umask(settings.umask):
                _write(path, redact(str(explain(error))))
        raise
    with _logged(path):
        path.unlink(missing_ok=True)


def _write(path: Path, error: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    draft = permissions.make_shared_directory(path.parent) / f".{secrets.token_hex(8)}"
    try:
        draft.write_text(Failure(error[:MAX_CHARACTERS], now).to_json())
        permissions.chmod_and_fsync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.warning("%s is not updated: %s", path, error.strerror or error)
