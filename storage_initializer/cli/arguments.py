"""Command line arguments: words to commands; pure.

Without a command name, the arguments are pairs of source and destination: KServe calls a storage initializer this way.
Sources contain `://`, so they cannot be mistaken for commands.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, get_args

from snapshot_format import reference as references
from snapshot_format.recipe import Variant
from snapshot_format.reference import MalformedReference, ModelReference
from storage_initializer.errors import InvalidReference, InvalidUsage
from storage_initializer.volume.garbage_collection import Policy

PROGRAM = "python -m storage_initializer"

EPILOG = """\
SOURCE is hf://owner/model, hf://owner/model:revision (a branch, a tag or a commit), or file:///absolute/path of a
directory or a tar archive. DEST is the root of a volume; the snapshot is published as DEST/<owner>--<model>/<commit>/.

other commands, each with --help:
  verify DIR    check a published snapshot against its record
  list DEST     list the snapshots on a volume
  gc DEST       remove old snapshots and stale files

environment: HF_ENDPOINT, HF_TOKEN, LOG_LEVEL, ADAPTER_REFERENCE (a PEFT adapter to publish too) and
STORAGE_INITIALIZER_*, see docs/reference/storage-initializer.md
exit codes: 0 done, 1 worth a retry, 2 pointless to retry; the last line on stderr is the reason
"""


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish snapshots on volumes, in order."""

    pairs: tuple[tuple[ModelReference, Path], ...]
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Values of flags, by setting name; they override the environment."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Check one published snapshot."""

    directory: Path
    fast: bool
    """Names and sizes only."""


@dataclass(frozen=True, slots=True)
class List:
    """List the snapshots on a volume."""

    root: Path


@dataclass(frozen=True, slots=True)
class Collect:
    """Remove old snapshots and stale files from a volume."""

    root: Path
    policy: Policy
    dry_run: bool


Command = Publish | Verify | List | Collect


def parse(words: Sequence[str]) -> Command:
    """Parse the command line.

    Raises:
        InvalidUsage: an unknown flag, or a wrong number of arguments.
        InvalidReference: a malformed reference.
        SystemExit: with code 0, after `--help`.
    """
    match words:
        case ["verify", *rest]:
            return _verify(rest)
        case ["list", *rest]:
            return _list(rest)
        case ["gc", *rest]:
            return _collect(rest)
        case _:
            return _publish(words)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise InvalidUsage(f"Invalid command line: {message}. Expected: {usage}")


def _parser(command: str, description: str, usage: str | None = None, epilog: str | None = None) -> _Parser:
    return _Parser(
        prog=f"{PROGRAM}{command}",
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _publish(words: Sequence[str]) -> Publish:
    parser = _parser(
        "",
        "Publish verified model snapshots on volumes, atomically and once.",
        usage=f"{PROGRAM} [FLAG ...] SOURCE DEST [SOURCE DEST ...]",
        epilog=EPILOG,
    )
    parser.add_argument("words", nargs="*", metavar="SOURCE DEST", help="pairs of a model and a volume")
    parser.add_argument(
        "--allow",
        action="append",
        dest="allow_patterns",
        metavar="PATTERN",
        help="files to publish, also code; repeatable",
    )
    parser.add_argument(
        "--ignore", action="append", dest="ignore_patterns", metavar="PATTERN", help="files to exclude; repeatable"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", default=None, help="pickled weights if there are no safetensors"
    )
    parser.add_argument(
        "--offline", action="store_true", default=None, help="no requests to the Hub; revisions keep their last commit"
    )
    parser.add_argument(
        "--prepare", choices=get_args(Variant), help="variant to derive from each snapshot; needs torch"
    )
    parser.add_argument(
        "--prepare-skip-modules", action="append", metavar="PATTERN", help="layers not to quantize; repeatable"
    )
    values = vars(parser.parse_intermixed_args(words))
    pairs: list[str] = values.pop("words")
    if not pairs or len(pairs) % 2:
        parser.error(f"{len(pairs)} arguments do not make pairs")
    if "" in pairs:
        parser.error("an argument is empty")
    return Publish(
        tuple(
            (parse_reference(source), Path(root).absolute())
            for source, root in zip(pairs[::2], pairs[1::2], strict=True)
        ),
        {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None
        },
    )


def _verify(words: Sequence[str]) -> Verify:
    parser = _parser(" verify", "Check a published snapshot against its record and report all differences.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="DEST/<owner>--<model>/<commit>")
    parser.add_argument("--fast", action="store_true", help="names and sizes only")
    values = parser.parse_args(words)
    return Verify(values.directory.absolute(), values.fast)


def _list(words: Sequence[str]) -> List:
    parser = _parser(" list", "List the snapshots on a volume with size, age, refs and reference.")
    parser.add_argument("root", type=Path, metavar="DEST", help="root of a volume")
    return List(parser.parse_args(words).root.absolute())


def _collect(words: Sequence[str]) -> Collect:
    parser = _parser(
        " gc",
        "Remove old snapshots without refs, and stale files of dead initializers.",
        epilog="Only safe while no reader serves these snapshots, see docs/reference/storage-initializer.md. "
        "Use --dry-run first.",
    )
    parser.add_argument("root", type=Path, metavar="DEST", help="root of a volume")
    parser.add_argument(
        "--keep", type=_count, metavar="N", help="latest snapshots of each model to keep. Default: 1; of a commit 0"
    )
    parser.add_argument("--reference", metavar="REF", help="model or commit to remove snapshots of")
    parser.add_argument("--dry-run", action="store_true", help="list without removing")
    parser.add_argument("--force", action="store_true", help="also snapshots with refs, and these refs")
    values = parser.parse_args(words)
    reference = None if values.reference is None else parse_reference(values.reference)
    return Collect(values.root.absolute(), Policy(values.keep, reference, values.force), values.dry_run)


def parse_reference(text: str) -> ModelReference:
    """Parse a reference of a model or an adapter.

    Raises:
        InvalidReference: it is malformed.
    """
    try:
        return references.parse(text)
    except MalformedReference as error:
        raise InvalidReference(str(error)) from error


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of snapshots")
    return int(text)
