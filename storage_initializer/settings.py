"""What the program can be told, and the only place that reads the command line and the environment.

Knows names, units and defaults; does nothing with them.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
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

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables that hold a secret; the second is read by huggingface_hub alone, where the first is not set."""

_BEARER = re.compile(r"\bbearer\s+[^\s'\"]+", re.IGNORECASE)
_USERINFO = re.compile(r"\b(https?|socks\w*)://[^\s/]*@", re.IGNORECASE)
_HOST = re.compile(r"[\w.:%-]+")
_SHORTEST_SECRET = 4


def _endpoint(text: str) -> str:
    """Refuse a URL that no request could use or that no log may show; the sentences never repeat it."""
    url = text.strip()
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        host, port = "", None
    else:
        if "@" in parts.netloc:
            raise PydanticCustomError("endpoint", "it holds a user or a password: remove them, and set HF_TOKEN")
    usable = _HOST.fullmatch(host) and port != 0 and url.isprintable() and not re.search(r"[\s?#\\]", url)
    if not usable or parts.scheme not in ("http", "https"):
        raise PydanticCustomError("endpoint", "expected https://host or http://host:port, with a path if need be")
    return url


def _token(secret: SecretStr) -> SecretStr | None:
    """Refuse what cannot travel in a header: the error of whoever tried would show it."""
    token = secret.get_secret_value().strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise PydanticCustomError(
            "token",
            "a token has printable ASCII characters and no white space: look for a line break or a blank inside it",
        )
    return SecretStr(token) if token else None


class Settings(BaseSettings):
    """Everything that the environment can change; durations in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    hf_endpoint: Annotated[str, AfterValidator(_endpoint)] = Field(
        default="https://huggingface.co", validation_alias="HF_ENDPOINT"
    )
    """The Hub or a mirror of it, as an http or https URL without user and password."""

    hf_token: Annotated[SecretStr, AfterValidator(_token)] | None = Field(default=None, validation_alias="HF_TOKEN")
    """Opens private and gated repositories; never logged. Without it, a login by `hf auth login` counts."""

    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)] = Field(
        default="INFO", validation_alias=AliasChoices(f"{PREFIX}LOG_LEVEL", "LOG_LEVEL")
    )
    """How much is told on stderr. Tracebacks appear with DEBUG only."""

    parallel_files: int = Field(default=4, ge=1, le=64)
    """Files that are fetched at the same time. More helps on fast lines and costs memory per file."""

    lock_stale_seconds: float = Field(default=30.0, ge=0.1, le=3600, allow_inf_nan=False)
    """Without a heartbeat for this long, the holder of a lease counts as dead.

    Five heartbeats fit into it; a volume that pauses for longer needs more.
    """

    lock_timeout_seconds: float = Field(default=7200.0, ge=0, le=604_800, allow_inf_nan=False)
    """How long to wait for another initializer that is alive and publishes the same snapshot."""

    progress_seconds: float = Field(default=2.0, gt=0, le=3600, allow_inf_nan=False)
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
        first = error.errors(include_input=False, include_context=False)[0]
        raise InvalidUsage(f"{_variable(str(first['loc'][0]))} has a wrong value: {first['msg']}") from error


def concealed(text: str) -> str:
    """A text as people may see it: `***` for the token of the environment, bearer tokens and passwords in URLs.

    A second fence behind `_token` and `_endpoint`, for every log line and the last sentence. Words of a token shorter
    than four characters stay: they are no secret, and every sentence holds them.
    """
    for variable, value in os.environ.items():
        if variable.upper() in _TOKENS:
            for word in sorted(value.split(), key=len, reverse=True):
                if len(word) >= _SHORTEST_SECRET:
                    text = text.replace(word, "***").replace(repr(word)[1:-1], "***")
    return _USERINFO.sub(r"\1://***@", _BEARER.sub("Bearer ***", text))


def known_variables() -> frozenset[str]:
    """Every `STORAGE_INITIALIZER_*` variable that means something."""
    return frozenset(f"{PREFIX}{name.upper()}" for name in Settings.model_fields if not name.startswith("hf_"))


def _variable(name: str) -> str:
    """The variable that gave a field its value, from the name under which pydantic reports the field."""
    if name == f"{PREFIX}LOG_LEVEL" and not any(os.environ[v] for v in os.environ if v.upper() == name):
        return "LOG_LEVEL"
    return name if name.isupper() else f"{PREFIX}{name.upper()}"


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
