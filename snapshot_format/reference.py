"""Grammar of model references.

    hf://owner/model                  the branch main
    hf://owner/model:revision         a branch, a tag or a 40-hex commit; `@` may replace `:`
    file:///absolute/directory        a local directory or archive; percent-encode characters that URLs do not allow

A reference determines two names on the volume:

- the slug, the directory of all snapshots of one model: `<owner>--<model>`, or `file--<directory name>` with the name
  percent-encoded. Names on the Hub never contain `--`, so slugs are unambiguous.
- the file name of a revision in `refs/`: the percent-encoded revision, so `refs/pr/4` is stored as `refs%2Fpr%2F4`.

Percent-encoding follows RFC 3986: every byte of the UTF-8 text except `A-Z a-z 0-9 - . _ ~` is encoded.
"""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

DEFAULT_REVISION = "main"
MAX_REPOSITORY_CHARACTERS = 96
"""Maximum length of `owner/model`, as on the Hub."""
MAX_ESCAPED_CHARACTERS = 200
"""Maximum length of an escaped name. File systems allow 255 bytes; staging names add a suffix."""

EXPECTED = "Expected hf://owner/model, hf://owner/model:revision or file:///absolute/directory."

_HUB = re.compile(r"hf://(?P<owner>[\w.-]+)/(?P<model>[\w.-]+)(?:[:@](?P<revision>.+))?", re.ASCII)
_NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"[\w+](?:[\w.+#@=-]*[\w+#@=-])?(?:/[\w+](?:[\w.+#@=-]*[\w+#@=-])?)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class MalformedReference(ValueError):
    """A text that is not a model reference."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}. {EXPECTED}")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A model repository on the Hub at one revision."""

    owner: str
    model: str
    revision: str = DEFAULT_REVISION

    @property
    def repository(self) -> str:
        """The repository id of the Hub's API, `owner/model`."""
        return f"{self.owner}/{self.model}"

    @property
    def name(self) -> str:
        """The reference without its revision."""
        return f"hf://{self.repository}"

    @property
    def slug(self) -> str:
        """The directory of this model's snapshots on a volume."""
        return f"{self.owner}--{self.model}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit hash, which never moves."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"{self.name}:{self.revision}"


@dataclass(frozen=True, slots=True)
class DirectoryReference:
    """A local directory or archive; its revision is always `main`."""

    path: Path

    @property
    def revision(self) -> str:
        """The revision whose ref points to the latest snapshot of this directory."""
        return DEFAULT_REVISION

    @property
    def name(self) -> str:
        """The reference as a URL."""
        return f"file://{quote(str(self.path))}"

    @property
    def slug(self) -> str:
        """The directory of its snapshots on a volume."""
        return f"file--{escape(self.path.name)}"

    @property
    def is_commit(self) -> bool:
        """Always false: the content of a directory may change."""
        return False

    def __str__(self) -> str:
        return self.name


ModelReference = HubReference | DirectoryReference


def parse(text: str) -> ModelReference:
    """Parse a reference.

    Raises:
        MalformedReference: the text matches neither form, or contains a name that the Hub does not allow.
    """
    if not text.isprintable():
        raise MalformedReference(f"{text!r} contains unprintable characters")
    if text.startswith("file://"):
        return _parse_directory(text)
    match = _HUB.fullmatch(text)
    if match is None:
        raise MalformedReference(f"{text!r} is not a reference")
    owner, model, revision = match["owner"], match["model"], match["revision"]
    for name in (owner, model):
        if not _NAME.fullmatch(name) or "--" in name or ".." in name:
            raise MalformedReference(f"{text!r} contains {name!r}, which is not a valid name on the Hub")
    if len(f"{owner}/{model}") > MAX_REPOSITORY_CHARACTERS:
        raise MalformedReference(f"{text!r} exceeds the Hub's limit of {MAX_REPOSITORY_CHARACTERS} characters")
    return HubReference(owner, model) if revision is None else HubReference(owner, model, _revision(text, revision))


def escape(name: str) -> str:
    """Percent-encode a revision or a directory name; `urllib.parse.unquote` reverses it."""
    return quote(name, safe="")


def _revision(text: str, revision: str) -> str:
    if not _REVISION.fullmatch(revision) or ".." in revision or len(escape(revision)) > MAX_ESCAPED_CHARACTERS:
        raise MalformedReference(f"{text!r} contains {revision!r}, which is not a branch, tag or commit")
    lower = revision.lower()
    return lower if _COMMIT.fullmatch(lower) else revision


def _parse_directory(text: str) -> DirectoryReference:
    try:
        path = unquote(text.removeprefix("file://"), errors="strict")
    except UnicodeDecodeError:
        path = ""
    if not path.startswith("/") or "\0" in path:
        raise MalformedReference(f"{text!r} is not an absolute directory")
    normal = Path("/" + posixpath.normpath(path).lstrip("/"))
    if normal.name == "" or len(escape(normal.name)) > MAX_ESCAPED_CHARACTERS:
        raise MalformedReference(f"{text!r} has no usable directory name")
    return DirectoryReference(normal)
