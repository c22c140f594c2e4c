"""Reading the locks."""

import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PINNED = re.compile(
    r"^([A-Za-z0-9._-]+)==(\S+)(?: ; (.+?))? \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def locked(path: str) -> dict[str, str]:
    """What pip would install here from a lock: versions by name."""
    found = PINNED.findall((ROOT / path).read_text())
    return {
        name: version
        for name, version, marker, _ in found
        if not marker or Requirement(f"{name} ; {marker}").marker.evaluate()
    }
