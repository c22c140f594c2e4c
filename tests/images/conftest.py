"""Reading the locks, and installing them."""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


class Environment:
    """An empty virtual environment, and the pip of this one to fill it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin/python"
        (self.packages,) = folder.glob("lib/python3.*/site-packages")

    def pip(self, *words: str | Path) -> str:
        """What pip says; where it fails, why."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *words: str | Path) -> None:
        self.pip("install", "--quiet", "--no-compile", "--only-binary", ":all:", *words)

    def installed(self) -> dict[str, str]:
        """Versions by name."""
        return {
            canonicalize_name(each["name"]): each["version"] for each in json.loads(self.pip("list", "--format=json"))
        }
