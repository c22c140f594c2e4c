"""What the program can be told, and the only place that reads the command line and the environment.

Knows names, units and defaults; does nothing with them.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from storage_initializer.errors import InvalidUsage

PREFIX = "STORAGE_INITIALIZER_"

USAGE = "python -m storage_initializer SOURCE DEST [SOURCE DEST ...]"

EPILOG = """\
SOURCE is hf://owner/model, hf://owner/model:revision (a branch, a tag or a commit) or file:///absolute/directory.
DEST is the root of a volume; the snapshot appears in DEST/<owner>--<model>/<commit>/.

environment: HF_ENDPOINT, HF_TOKEN, LOG_LEVEL and STORAGE_INITIALIZER_*, see storage_initializer/README.md
exit codes: 0 done, 1 worth a retry, 2 pointless to retry; the last line on stderr says why
"""


class Settings(BaseSettings):
    """Everything that the environment can change; durations in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    hf_endpoint: str = Field(
        default="https://huggingface.co", validation_alias="HF_ENDPOINT", pattern=r"^https?://[^/]"
    )
    """The Hub or a mirror of it, as an http or https URL."""

    hf_token: SecretStr | None = Field(default=None, validation_alias="HF_TOKEN")
    """Opens private and gated repositories; never logged. Without it, a login by `hf auth login` counts."""

    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)] = Field(
        default="INFO", validation_alias=AliasChoices(f"{PREFIX}LOG_LEVEL", "LOG_LEVEL")
    )
    """How much is told on stderr. Tracebacks appear with DEBUG only."""

    parallel_files: int = Field(default=4, ge=1, le=64)
    """Files that are fetched at the same time. More helps on fast lines and costs memory per file."""

    lock_stale_seconds: float = Field(default=30.0, gt=0)
    """Without a heartbeat for this long, the holder of a lease counts as dead.

    Five heartbeats fit into it; a volume that pauses for longer needs more.
    """

    lock_timeout_seconds: float = Field(default=7200.0, ge=0)
    """How long to wait for another initializer that is alive and publishes the same snapshot."""

    progress_seconds: float = Field(default=2.0, gt=0)
    """Time between two lines of progress in a log; a terminal gets a live bar instead."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The words of the command line: what to put where, in order."""

    pairs: tuple[tuple[str, Path], ...]


def read(words: Sequence[str] | None = None) -> tuple[CommandLine, Settings]:
    """Read the command line (`words`, by default the program's own) and the environment.

    Raises:
        InvalidUsage: a flag, a number of arguments, a variable's name or a value that is not understood.
        SystemExit: with code 0, after `--help`.
    """
    command_line = _command_line(sys.argv[1:] if words is None else words)
    _refuse_unknown_variables()
    try:
        return command_line, Settings()
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = str(first["loc"][0])
        variable = name if name.isupper() else f"{PREFIX}{name.upper()}"
        raise InvalidUsage(f"{variable} has a wrong value: {first['msg']}") from error


def known_variables() -> frozenset[str]:
    """Every `STORAGE_INITIALIZER_*` variable that means something."""
    return frozenset(f"{PREFIX}{name.upper()}" for name in Settings.model_fields if not name.startswith("hf_"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidUsage(f"{message}: expected {USAGE}")


def _command_line(words: Sequence[str]) -> CommandLine:
    parser = _Parser(
        prog="python -m storage_initializer",
        usage=USAGE,
        description="Put one snapshot of a model into a directory of a volume: verified, atomic, once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="SOURCE DEST", help="what to put where")
    given: list[str] = parser.parse_args(words).words
    if not given or len(given) % 2:
        parser.error(f"{len(given)} arguments do not make pairs")
    if "" in given:
        parser.error("an argument is empty")
    return CommandLine(tuple((source, Path(root)) for source, root in zip(given[::2], given[1::2], strict=True)))


def _refuse_unknown_variables() -> None:
    known = known_variables()
    for variable in sorted(os.environ):
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            raise InvalidUsage(f"{variable} is no setting: unset it, or use one of {', '.join(sorted(known))}")
