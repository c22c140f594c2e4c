"""References: which model, from where, in which revision; pure text.

    hf://owner/model                  the branch main
    hf://owner/model:revision         a branch, a tag or a 40-hex commit; `@` may stand for the `:`
    file:///absolute/directory        a directory on this machine; percent-encode what a URL cannot hold

Two names on the volume derive from a reference, and the predictor derives them in the same way:

- the slug, the directory of all snapshots of one model: `<owner>--<model>` as written, which is unambiguous since no
  name on the Hub holds `--`; for a directory, `file--<name of the directory>`, the name percent-encoded;
- the name of a revision's file in `refs/`: the revision, percent-encoded.

Percent-encoding is RFC 3986's: every byte of the UTF-8 text except `A-Z a-z 0-9 - . _ ~` becomes `%` and two upper-case
hex digits, so `refs/pr/4` is written `refs%2Fpr%2F4`; in Python, `urllib.parse.quote(text, safe="")`.
"""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from storage_initializer.errors import InvalidReference

DEFAULT_REVISION = "main"
LONGEST_NAME = 96
"""Characters in `owner/model`, the Hub's own limit."""
LONGEST_REVISION = 200
"""Characters in a revision's file name: leaves room in the 255 bytes that a file system allows."""

EXPECTED = "expected hf://owner/model, hf://owner/model:revision or file:///absolute/directory"

_HUB = re.compile(r"hf://(?P<owner>[\w.-]+)/(?P<model>[\w.-]+)(?:[:@](?P<revision>.+))?", re.ASCII)
_NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
_REVISION = re.compile(r"[\w+](?:[\w.+#@=-]*[\w+#@=-])?(?:/[\w+](?:[\w.+#@=-]*[\w+#@=-])?)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A model repository on the Hub at one revision."""

    owner: str
    model: str
    revision: str = DEFAULT_REVISION

    @property
    def repository(self) -> str:
        """`owner/model`, as the Hub's API wants it."""
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
        """Whether the revision is a commit, which never moves."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"{self.name}:{self.revision}"


@dataclass(frozen=True, slots=True)
class DirectoryReference:
    """A directory of this machine, its revision always `main`."""

    path: Path

    @property
    def revision(self) -> str:
        """The revision under which the volume remembers the latest snapshot of this directory."""
        return DEFAULT_REVISION

    @property
    def name(self) -> str:
        """The reference as a URL."""
        return f"file://{quote(str(self.path))}"

    @property
    def slug(self) -> str:
        """The directory of its snapshots on a volume."""
        return f"file--{quote(self.path.name, safe='')}"

    @property
    def is_commit(self) -> bool:
        """Never: a directory may change."""
        return False

    def __str__(self) -> str:
        return self.name


ModelReference = HubReference | DirectoryReference


def parse(text: str) -> ModelReference:
    """Read a reference.

    Raises:
        InvalidReference: the text follows neither form, or names something the Hub cannot hold.
    """
    if not text.isprintable():
        raise InvalidReference(f"{text!r} holds unprintable characters: {EXPECTED}")
    if text.startswith("file://"):
        return _parse_directory(text)
    match = _HUB.fullmatch(text)
    if match is None:
        raise InvalidReference(f"{text!r} is not a reference: {EXPECTED}")
    owner, model = match["owner"], match["model"]
    for name in (owner, model):
        if not _NAME.fullmatch(name) or "--" in name or ".." in name:
            raise InvalidReference(f"{text!r} names {name!r}, which is no name on the Hub: {EXPECTED}")
    if len(f"{owner}/{model}") > LONGEST_NAME:
        raise InvalidReference(f"{text!r} is longer than the {LONGEST_NAME} characters of a name on the Hub")
    revision = match["revision"]
    return HubReference(owner, model) if revision is None else HubReference(owner, model, _revision(text, revision))


def escape(revision: str) -> str:
    """The file name of a revision in `refs/`; `urllib.parse.unquote` takes it back."""
    return quote(revision, safe="")


def _revision(text: str, revision: str) -> str:
    if not _REVISION.fullmatch(revision) or ".." in revision or len(escape(revision)) > LONGEST_REVISION:
        raise InvalidReference(f"{text!r} names {revision!r}, which is no branch, tag or commit: {EXPECTED}")
    lower = revision.lower()
    return lower if _COMMIT.fullmatch(lower) else revision


def _parse_directory(text: str) -> DirectoryReference:
    try:
        path = unquote(text.removeprefix("file://"), errors="strict")
    except UnicodeDecodeError:
        path = ""
    if not path.startswith("/") or "\0" in path:
        raise InvalidReference(f"{text!r} is not an absolute directory: {EXPECTED}")
    normal = Path("/" + posixpath.normpath(path).lstrip("/"))
    if normal.name == "" or len(quote(normal.name, safe="")) > LONGEST_REVISION:
        raise InvalidReference(f"{text!r} has no name to publish it under: {EXPECTED}")
    return DirectoryReference(normal)
