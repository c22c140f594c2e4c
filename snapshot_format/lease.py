"""The file of a lease, which one storage initializer holds while it publishes a snapshot.

    {"token": "9d3e…", "name": "model-download-x7k2p:1"}

Its holder updates the file's mtime regularly.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a lease; `last_beat` is the file's mtime in the volume's seconds since the epoch."""

    token: str
    name: str
    last_beat: float


def read_holder(path: Path) -> Holder | None:
    """Read a lease; None if it does not exist. Opening it makes network file systems refresh its attributes.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with path.open() as file:
            last_beat = os.fstat(file.fileno()).st_mtime
            fields = json.load(file)
        return Holder(fields["token"], fields["name"], last_beat)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        # Created but not yet written, or its creator died in between.
        return Holder("", "a storage initializer", last_beat)
