"""The record that lies in every published snapshot, `.snapshot.json`: its form, and how to read it.

    {
      "format_version": 1,
      "reference": "hf://demo/arithmetic:main",
      "commit": "4f0a…c1",
      "files": [{"path": "config.json", "size": 612, "sha256": "9b1c…"}],
      "choice": {"allow": [], "ignore": ["*.md"], "pickle": false},
      "derived_from": null,
      "tool": "kserve-llm 0.1.0",
      "published_at": "2026-11-24T04:00:13Z",
      "duration_seconds": 12.5
    }

In a snapshot that was made of another one beside it, which has the same reference and commit, `derived_from` says how:

      "derived_from": {
        "reference": "hf://demo/arithmetic:main", "commit": "4f0a…c1",
        "recipe": "int8-cpu", "version": 1, "dtype": "bfloat16", "keep": []
      }

Readers ignore fields they do not know. Who writes it, and when, is for `volume.py` to say.
"""

import datetime
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage_initializer.errors import RefusedVolume
from storage_initializer.sources.file_selection import Choice, File

FORMAT_VERSION = 1
"""Of the record and of the layout. A reader refuses every other one, and ignores fields it does not know."""

RECORD = ".snapshot.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a snapshot was made of another one."""

    name: str
    version: int
    """Another one makes other weights of the same ones."""
    dtype: str
    """In which the weights were rounded."""
    keep: tuple[str, ...]
    """Patterns of layers that were not rounded."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a published snapshot says about itself."""

    reference: str
    commit: str
    files: tuple[File, ...]
    choice: Choice
    recipe: Recipe | None
    """None for a snapshot as it is on the Hub; otherwise it was made of that, of the same commit."""
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
            "derived_from": self.recipe
            and {
                "reference": self.reference,
                "commit": self.commit,
                "recipe": self.recipe.name,
                "version": self.recipe.version,
                "dtype": self.recipe.dtype,
                "keep": self.recipe.keep,
            },
            "tool": self.tool,
            "published_at": self.published_at,
            "duration_seconds": self.duration_seconds,
        }
        return json.dumps(fields, indent=2) + "\n"


def make(
    reference: str, commit: str, files: tuple[File, ...], choice: Choice, seconds: float, recipe: Recipe | None = None
) -> Record:
    """The record of what is published now, by this program; `seconds` is how long the work took."""
    # Imported when a record is written, since it takes longer than finding a published snapshot.
    import importlib.metadata

    return Record(
        reference=reference,
        commit=commit,
        files=files,
        choice=choice,
        recipe=recipe,
        tool=f"kserve-llm {importlib.metadata.version('kserve-llm')}",
        published_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        duration_seconds=round(seconds, 3),
    )


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
                recipe=_recipe(fields.get("derived_from")),
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


def _recipe(origin: Any) -> Recipe | None:
    if origin is None:
        return None
    return Recipe(str(origin["recipe"]), int(origin["version"]), str(origin["dtype"]), tuple(origin["keep"]))
