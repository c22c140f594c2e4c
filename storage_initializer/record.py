"""The record that lies in every published snapshot, `.snapshot.json`: its form, and how to read it.

    {
      "format_version": 1,
      "reference": "hf://demo/arithmetic:main",
      "commit": "4f0a…c1",
      "files": [{"path": "config.json", "size": 612, "sha256": "9b1c…"}],
      "choice": {"allow": [], "ignore": ["*.md"], "pickle": false},
      "derived": [{"path": "model-int8.safetensors", "from": ["model.safetensors"], "by": "int8 1.0"}],
      "tool": "kserve-llm 0.1.0",
      "published_at": "2026-11-24T04:00:13Z",
      "duration_seconds": 12.5
    }

Readers ignore fields they do not know. Who writes it, and when, is for `volume.py` to say.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from storage_initializer.errors import RefusedVolume
from storage_initializer.plan import Choice, File

FORMAT_VERSION = 1
"""Of the record and of the layout. A reader refuses every other one, and ignores fields it does not know."""

RECORD = ".snapshot.json"


@dataclass(frozen=True, slots=True)
class Derivation:
    """One file that does not come from the source, but was made of files that do."""

    path: str
    sources: tuple[str, ...]
    """Paths in the same snapshot."""
    by: str
    """The tool that made it, with its version."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a published snapshot says about itself."""

    reference: str
    commit: str
    files: tuple[File, ...]
    choice: Choice
    derived: tuple[Derivation, ...]
    tool: str
    published_at: str
    """UTC, RFC 3339."""
    duration_seconds: float
    """From the start of the work on this snapshot to the rename."""

    @property
    def size_bytes(self) -> int:
        """Of all files, the record itself not counted."""
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> str:
        """The record as it lies on the volume."""
        fields = {
            "format_version": FORMAT_VERSION,
            "reference": self.reference,
            "commit": self.commit,
            "files": [{"path": file.path, "size": file.size_bytes, "sha256": file.sha256} for file in self.files],
            "choice": asdict(self.choice),
            "derived": [{"path": one.path, "from": one.sources, "by": one.by} for one in self.derived],
            "tool": self.tool,
            "published_at": self.published_at,
            "duration_seconds": self.duration_seconds,
        }
        return json.dumps(fields, indent=2) + "\n"


def read(snapshot: Path) -> Record:
    """The record of a published snapshot.

    Raises:
        RefusedVolume: there is none, it cannot be understood, or a tool with another format wrote it.
    """
    path = snapshot / RECORD
    try:
        fields = json.loads(path.read_bytes())
        version = int(fields["format_version"])
        if version == FORMAT_VERSION:
            choice = fields.get("choice", {})
            return Record(
                reference=str(fields["reference"]),
                commit=str(fields["commit"]),
                files=tuple(File(file["path"], int(file["size"]), file["sha256"]) for file in fields["files"]),
                choice=Choice(
                    tuple(choice.get("allow", ())), tuple(choice.get("ignore", ())), bool(choice.get("pickle"))
                ),
                derived=tuple(
                    Derivation(one["path"], tuple(one["from"]), one["by"]) for one in fields.get("derived", ())
                ),
                tool=str(fields["tool"]),
                published_at=str(fields["published_at"]),
                duration_seconds=float(fields["duration_seconds"]),
            )
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RefusedVolume(
            f"{snapshot} has no readable {RECORD}, so nobody knows what it holds: remove it and run again"
        ) from error
    raise RefusedVolume(
        f"{path} has format version {version}, and this program knows {FORMAT_VERSION} only: "
        "use the version of the program that published it"
    )
