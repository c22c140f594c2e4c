"""The record in every published snapshot, `.snapshot.json`.

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

A derived variant has the reference and commit of its source; `derived_from` contains the recipe:

      "derived_from": {
        "reference": "hf://demo/arithmetic:main", "commit": "4f0a…c1",
        "recipe": "int8-cpu", "version": 1, "dtype": "bfloat16", "skip_modules": []
      }

Readers ignore unknown fields and reject unknown format versions.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
"""Version of the record and of the layout."""

RECORD = ".snapshot.json"


class InvalidRecord(ValueError):
    """A record that cannot be parsed."""


class UnsupportedFormatVersion(InvalidRecord):
    """A record of another format version."""

    def __init__(self, version: int) -> None:
        super().__init__(f"format version {version} instead of {FORMAT_VERSION}")
        self.version = version


@dataclass(frozen=True, slots=True)
class File:
    """A file of a snapshot: its relative path with `/`, its size and its checksums.

    The Hub publishes a sha256 for large files (LFS) and git's blob sha1 for small ones. Verification adds the sha256 to
    every file, so records always contain it.
    """

    path: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class FileSelection:
    """Patterns that select files of a repository; the default leaves the choice to the storage initializer."""

    allow: tuple[str, ...] = ()
    """`fnmatch` patterns on whole paths. If there are any, a path must match one. `a/` means `a/*`."""
    ignore: tuple[str, ...] = ()
    """Paths that match one of these patterns are excluded."""
    pickle: bool = False
    """Whether pickled weights may replace missing safetensors."""

    def accepts(self, path: str) -> bool:
        """Return whether the patterns select a path."""
        return (not self.allow or _matches(path, self.allow)) and not _matches(path, self.ignore)

    def agrees_with(self, published: "FileSelection") -> bool:
        """Return whether this selection gives the same files as the published one."""
        return (self.allow, self.ignore) == (published.allow, published.ignore) and (
            self.pickle or not published.pickle
        )

    def __str__(self) -> str:
        patterns = (("allow", self.allow), ("ignore", self.ignore))
        flags = [f"--{flag} {pattern}" for flag, group in patterns for pattern in group]
        return " ".join(flags + ["--allow-pickle"] * self.pickle) or "no patterns"


@dataclass(frozen=True, slots=True)
class QuantizationRecipe:
    """The recipe that derived a variant from its source."""

    name: str
    version: int
    dtype: str
    """The dtype before quantization."""
    skip_modules: tuple[str, ...]
    """Patterns of layers that were not quantized."""


@dataclass(frozen=True, slots=True)
class Record:
    """The content of `.snapshot.json`."""

    reference: str
    commit: str
    files: tuple[File, ...]
    selection: FileSelection
    recipe: QuantizationRecipe | None
    """None for an original snapshot."""
    tool: str
    published_at: str
    """UTC, RFC 3339."""
    duration_seconds: float
    """From the start of the work on this snapshot to the rename."""

    @property
    def size_bytes(self) -> int:
        """Total size of the files, without the record itself."""
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> str:
        """Return the text of the record file."""
        fields = {
            "format_version": FORMAT_VERSION,
            "reference": self.reference,
            "commit": self.commit,
            "files": [{"path": file.path, "size": file.size_bytes, "sha256": file.sha256} for file in self.files],
            "choice": asdict(self.selection),
            "derived_from": self.recipe
            and {
                "reference": self.reference,
                "commit": self.commit,
                "recipe": self.recipe.name,
                "version": self.recipe.version,
                "dtype": self.recipe.dtype,
                "skip_modules": self.recipe.skip_modules,
            },
            "tool": self.tool,
            "published_at": self.published_at,
            "duration_seconds": self.duration_seconds,
        }
        return json.dumps(fields, indent=2) + "\n"


def read(snapshot: Path) -> Record:
    """Read the record of a published snapshot.

    Raises:
        FileNotFoundError, NotADirectoryError: the directory has no record.
        InvalidRecord: the record cannot be parsed.
        UnsupportedFormatVersion: the record has another format version.
    """
    try:
        fields = json.loads((snapshot / RECORD).read_bytes())
        version = int(fields["format_version"])
        if version != FORMAT_VERSION:
            raise UnsupportedFormatVersion(version)
        choice = fields.get("choice", {})
        return Record(
            reference=str(fields["reference"]),
            commit=str(fields["commit"]),
            files=tuple(File(str(file["path"]), int(file["size"]), file["sha256"]) for file in fields["files"]),
            selection=FileSelection(
                tuple(choice.get("allow", ())), tuple(choice.get("ignore", ())), bool(choice.get("pickle"))
            ),
            recipe=_recipe(fields.get("derived_from")),
            tool=str(fields["tool"]),
            published_at=str(fields["published_at"]),
            duration_seconds=float(fields["duration_seconds"]),
        )
    except InvalidRecord:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidRecord(f"{type(error).__name__}: {error}") from error


def _recipe(fields: Any) -> QuantizationRecipe | None:
    if fields is None:
        return None
    return QuantizationRecipe(
        str(fields["recipe"]), int(fields["version"]), str(fields["dtype"]), tuple(map(str, fields["skip_modules"]))
    )


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)
