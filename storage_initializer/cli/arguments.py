"""What the words of the command line ask for: pure, from words to a command.

Words that name no command are pairs of a source and a destination: that is how KServe calls a storage initializer. No
source can be mistaken for a command, since every source holds `://`.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, get_args

from snapshot_format.reference import MalformedReference, ModelReference
from snapshot_format.reference import parse as parse_reference
from storage_initializer.errors import InvalidReference, InvalidUsage

PROGRAM = "python -m storage_initializer"

Form = Literal["int8-cpu"]
"""What can be made of a snapshot ahead of serving: linear layers rounded for the int8 kernels of a CPU."""

EPILOG = """\
SOURCE is hf://owner/model, hf://owner/model:revision (a branch, a tag or a commit), or file:///absolute/path of a
directory or a tar archive. DEST is the root of a volume; the snapshot appears in DEST/<owner>--<model>/<commit>/.

other commands, each with --help:
  verify DIR    check a published snapshot against its record
  list DEST     show the snapshots on a volume
  gc DEST       remove old snapshots and what dead initializers left behind

environment: HF_ENDPOINT, HF_TOKEN, LOG_LEVEL and STORAGE_INITIALIZER_*, see storage_initializer/README.md
exit codes: 0 done, 1 worth a retry, 2 pointless to retry; the last line on stderr says why
"""


@dataclass(frozen=True, slots=True)
class Publish:
    """Put what onto which volume, in order."""

    pairs: tuple[tuple[ModelReference, Path], ...]
    overrides: Mapping[str, object] = field(default_factory=dict)
    """What flags said, by the name of the setting; it counts more than the environment."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Check one published snapshot."""

    directory: Path
    fast: bool
    """Names and sizes only."""


@dataclass(frozen=True, slots=True)
class List:
    """Show what lies on a volume."""

    root: Path


@dataclass(frozen=True, slots=True)
class Collect:
    """Remove old snapshots and leftovers from a volume."""

    root: Path
    keep: int | None
    """How many snapshots of each model stay, the latest ones; None where nobody said."""
    reference: ModelReference | None
    dry_run: bool
    force: bool


Command = Publish | Verify | List | Collect


def parse(words: Sequence[str]) -> Command:
    """Read the words.

    Raises:
        InvalidUsage: a flag, or a number of arguments, that is not understood.
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
        raise InvalidUsage(f"{message}: expected {' '.join(self.format_usage().removeprefix('usage: ').split())}")


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
        "Put snapshots of models onto volumes: verified, atomic, once.",
        usage=f"{PROGRAM} [FLAG ...] SOURCE DEST [SOURCE DEST ...]",
        epilog=EPILOG,
    )
    parser.add_argument("words", nargs="*", metavar="SOURCE DEST", help="what to put where")
    parser.add_argument(
        "--allow", action="append", dest="allow_patterns", metavar="PATTERN", help="only files that match; repeatable"
    )
    parser.add_argument(
        "--ignore", action="append", dest="ignore_patterns", metavar="PATTERN", help="no file that matches; repeatable"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", default=None, help="take pickled weights where there are no safetensors"
    )
    parser.add_argument(
        "--offline", action="store_true", default=None, help="ask no Hub; a revision is what it was the last time"
    )
    parser.add_argument(
        "--prepare", choices=get_args(Form), help="publish beside each snapshot what is made of it; needs torch"
    )
    parser.add_argument(
        "--prepare-keep", action="append", metavar="PATTERN", help="layers that are not to be rounded; repeatable"
    )
    given = vars(parser.parse_intermixed_args(words))
    pairs: list[str] = given.pop("words")
    if not pairs or len(pairs) % 2:
        parser.error(f"{len(pairs)} arguments do not make pairs")
    if "" in pairs:
        parser.error("an argument is empty")
    return Publish(
        tuple(
            (_reference(source), Path(root).absolute()) for source, root in zip(pairs[::2], pairs[1::2], strict=True)
        ),
        {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        },
    )


def _verify(words: Sequence[str]) -> Verify:
    parser = _parser(" verify", "Check a published snapshot against its record; tell everything that is wrong.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="DEST/<owner>--<model>/<commit>")
    parser.add_argument("--fast", action="store_true", help="compare names and sizes only")
    given = parser.parse_args(words)
    return Verify(given.directory.absolute(), given.fast)


def _list(words: Sequence[str]) -> List:
    parser = _parser(" list", "Show the snapshots on a volume: size, age, the references that lead there.")
    parser.add_argument("root", type=Path, metavar="DEST", help="the root of a volume")
    return List(parser.parse_args(words).root.absolute())


def _collect(words: Sequence[str]) -> Collect:
    parser = _parser(
        " gc",
        "Remove old snapshots that no refs/ entry leads to, and what dead initializers left behind.",
        epilog="Safe only while no reader serves what goes, see storage_initializer/README.md: try --dry-run first.",
    )
    parser.add_argument("root", type=Path, metavar="DEST", help="the root of a volume")
    parser.add_argument(
        "--keep", type=_count, metavar="N", help="latest snapshots of each model that stay (1; of a commit 0)"
    )
    parser.add_argument("--reference", metavar="REF", help="only snapshots of this model; of a commit, only that one")
    parser.add_argument("--dry-run", action="store_true", help="tell what would go, and remove nothing")
    parser.add_argument("--force", action="store_true", help="also snapshots that refs/ entries lead to, and these")
    given = parser.parse_args(words)
    reference = None if given.reference is None else _reference(given.reference)
    return Collect(given.root.absolute(), given.keep, reference, given.dry_run, given.force)


def _reference(text: str) -> ModelReference:
    try:
        return parse_reference(text)
    except MalformedReference as error:
        raise InvalidReference(str(error)) from error


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of snapshots")
    return int(text)
