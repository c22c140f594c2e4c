"""What the program can be told, and the only place that reads the command line and the environment.

Knows names, units and defaults; does nothing with them.
"""

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from storage_initializer.cli import arguments
from storage_initializer.cli.arguments import Command, Form, Publish
from storage_initializer.errors import InvalidUsage

PREFIX = "STORAGE_INITIALIZER_"

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


def _patterns(given: object) -> object:
    """KServe's own initializer takes a JSON list or words with commas between them: so does this one."""
    if not isinstance(given, str):
        return given
    try:
        listed = json.loads(given) if given.lstrip().startswith("[") else given.split(",")
    except ValueError as error:
        raise PydanticCustomError("patterns", 'expected a JSON list like ["*.json"], or *.json,*.txt') from error
    return [pattern.strip() if isinstance(pattern, str) else pattern for pattern in listed if pattern != ""]


def _umask(given: object) -> object:
    """Octal digits, as for the shell's umask; never one that takes reading away from the group."""
    if not isinstance(given, str):
        return given
    if not re.fullmatch(r"0?[0-7]{3}", given) or int(given, 8) & 0o050:
        raise PydanticCustomError("umask", "expected three octal digits that let the group read, like 0022 or 0027")
    return int(given, 8)


Patterns = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_patterns)]


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

    log_format: Literal["text", "json"] = "text"
    """How stderr and the summaries look; the last line of a failure is a bare sentence in both."""

    allow_patterns: Patterns = Field(default=(), validation_alias="STORAGE_ALLOW_PATTERNS")
    """Only files whose path matches one of these (fnmatch; `*` crosses `/`) are published; all, if there are none.

    KServe's own variable, as a JSON list or with commas; so is the next one.
    """

    ignore_patterns: Patterns = Field(default=(), validation_alias="STORAGE_IGNORE_PATTERNS")
    """No file whose path matches one of these is published."""

    allow_pickle: bool = False
    """Take pickled weights where there are no safetensors. A pickle can run code in whoever opens it."""

    offline: bool = Field(default=False, validation_alias=AliasChoices(f"{PREFIX}OFFLINE", "HF_HUB_OFFLINE"))
    """Ask no Hub: a branch or tag stands for the commit that it was resolved to the last time."""

    prepare: Form | None = None
    """What to publish beside each snapshot, made of it: `int8-cpu`, its linear layers rounded to int8. Needs torch."""

    prepare_keep: Patterns = ()
    """Layers that are not to be rounded then: a predictor takes what was prepared only if it would keep the same."""

    umask: Annotated[int, BeforeValidator(_umask)] = 0o022
    """Rights that nothing on the volume gets, in octal; the group must be able to read (fsGroup)."""

    parallel_files: int = Field(default=4, ge=1, le=64)
    """Files that are fetched at the same time. More helps on fast lines and costs memory per file."""

    xet_buffer_mib: int = Field(default=128, ge=16, le=65_536)
    """Mebibytes that hf_xet may hold on their way to the disk, for all files together; its own default is gigabytes."""

    attempts: int = Field(default=6, ge=1, le=100)
    """How often the Hub is asked one thing, or for the rest of one file, before the run ends with exit code 1."""

    retry_wait_seconds: float = Field(default=1.0, ge=0.001, le=60, allow_inf_nan=False)
    """The first wait between two attempts; every further one is twice as long, 60 s at most.

    Where the Hub says how long to wait (Retry-After), that counts, up to five minutes.
    """

    stall_seconds: float = Field(default=30.0, ge=0.1, le=3600, allow_inf_nan=False)
    """How long a connection may be silent, or slower than the floor below, before it is given up and made anew."""

    stall_bytes_per_second: int = Field(default=4096, ge=0)
    """The floor: a file that comes more slowly on average over `stall_seconds` has stalled."""

    lock_stale_seconds: float = Field(default=30.0, ge=0.1, le=3600, allow_inf_nan=False)
    """Without a heartbeat for this long, the holder of a lease counts as dead.

    Five heartbeats fit into it; a volume that pauses for longer needs more.
    """

    lock_timeout_seconds: float = Field(default=7200.0, ge=0, le=604_800, allow_inf_nan=False)
    """How long to wait for another initializer that is alive and publishes the same snapshot."""

    progress_seconds: float = Field(default=2.0, gt=0, le=3600, allow_inf_nan=False)
    """Time between two lines of progress in a log; a terminal gets a live bar instead."""


def read(words: Sequence[str] | None = None) -> tuple[Command, Settings]:
    """Read the command line (`words`, by default the program's own) and the environment.

    Raises:
        InvalidUsage: a flag, a number of arguments, a variable's name or a value that is not understood.
        SystemExit: with code 0, after `--help`.
    """
    command = arguments.parse(sys.argv[1:] if words is None else list(words))
    _refuse_unknown_variables()
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        raise InvalidUsage(f"{_variable(str(first['loc'][0]))} has a wrong value: {first['msg']}") from error
    if isinstance(command, Publish):
        settings = settings.model_copy(update=command.overrides)
    return command, settings


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


def limit_xet(settings: Settings) -> None:
    """Tell hf_xet, which reads the environment when it is loaded, how much to hold, how wide to go, how long to wait.

    KServe sets `HF_XET_HIGH_PERFORMANCE`, which trades gigabytes of memory for speed; here the settings count.
    """
    buffer = f"{settings.xet_buffer_mib}mb"
    os.environ |= {
        "HF_XET_HIGH_PERFORMANCE": "0",
        "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": buffer,
        "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": buffer,
        "HF_XET_RECONSTRUCTION_MIN_PREFETCH_BUFFER": "8mb",
        "HF_XET_DATA_MAX_CONCURRENT_FILE_DOWNLOADS": str(settings.parallel_files),
        "HF_XET_CLIENT_READ_TIMEOUT": f"{math.ceil(settings.stall_seconds)}s",
    }


def known_variables() -> frozenset[str]:
    """Every `STORAGE_INITIALIZER_*` variable that means something."""
    fields = Settings.model_fields.items()
    return frozenset(f"{PREFIX}{name.upper()}" for name, field in fields if not isinstance(field.validation_alias, str))


def _variable(name: str) -> str:
    """The variable that gave a field its value, from the name under which pydantic reports the field."""
    second = {f"{PREFIX}LOG_LEVEL": "LOG_LEVEL", f"{PREFIX}OFFLINE": "HF_HUB_OFFLINE"}.get(name)
    if second and not any(os.environ[variable] for variable in os.environ if variable.upper() == name):
        return second
    return name if name.isupper() else f"{PREFIX}{name.upper()}"


def _refuse_unknown_variables() -> None:
    known = known_variables()
    for variable in sorted(os.environ):
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            raise InvalidUsage(f"{variable} is no setting: unset it, or use one of {', '.join(sorted(known))}")
