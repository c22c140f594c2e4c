"""Settings from the environment: names, units and defaults."""

import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from snapshot_format.recipe import Variant
from storage_initializer.errors import InvalidUsage

PREFIX = "STORAGE_INITIALIZER_"

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables with secrets. huggingface_hub reads the second one if the first is not set."""

_BEARER = re.compile(r"\bbearer\s+[^\s'\"]+", re.IGNORECASE)
_USERINFO = re.compile(r"\b(https?|socks\w*)://[^\s/]*@", re.IGNORECASE)
_HOST = re.compile(r"[\w.:%-]+")
_MIN_SECRET_CHARACTERS = 4


def _endpoint(text: str) -> str:
    """Reject URLs that are unusable or must not be logged; messages never repeat the value."""
    url = text.strip()
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        host, port = "", None
    else:
        if "@" in parts.netloc:
            raise PydanticCustomError("endpoint", "it contains a user or password; remove it and set HF_TOKEN")
    usable = _HOST.fullmatch(host) and port != 0 and url.isprintable() and not re.search(r"[\s?#\\]", url)
    if not usable or parts.scheme not in ("http", "https"):
        raise PydanticCustomError("endpoint", "expected https://host or http://host:port, with an optional path")
    return url


def _token(secret: SecretStr) -> SecretStr | None:
    """Reject tokens that are not valid in a header: the HTTP client's error would show them."""
    token = secret.get_secret_value().strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise PydanticCustomError(
            "token", "expected printable ASCII without white space; remove line breaks and blanks"
        )
    return SecretStr(token) if token else None


def _patterns(value: object) -> object:
    """Parse a JSON list or a comma-separated list, like KServe's own initializer."""
    if not isinstance(value, str):
        return value
    try:
        patterns = json.loads(value) if value.lstrip().startswith("[") else value.split(",")
    except ValueError as error:
        raise PydanticCustomError("patterns", 'expected a JSON list like ["*.json"], or *.json,*.txt') from error
    return [pattern.strip() if isinstance(pattern, str) else pattern for pattern in patterns if pattern != ""]


def _umask(value: object) -> object:
    """Parse octal digits as in the shell's umask; the group must keep its read permission."""
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"0?[0-7]{3}", value) or int(value, 8) & 0o050:
        raise PydanticCustomError("umask", "expected three octal digits that let the group read, like 0022 or 0027")
    return int(value, 8)


Patterns = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_patterns)]


class Settings(BaseSettings):
    """Settings of the storage initializer; durations in seconds."""

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
    """The Hub or a mirror, as an http or https URL without user and password."""

    hf_token: Annotated[SecretStr, AfterValidator(_token)] | None = Field(default=None, validation_alias="HF_TOKEN")
    """Token for private and gated repositories; never logged. Default: the login of `hf auth login`."""

    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)] = Field(
        default="INFO", validation_alias=AliasChoices(f"{PREFIX}LOG_LEVEL", "LOG_LEVEL")
    )
    """Log level on stderr. Tracebacks appear with DEBUG only."""

    log_format: Literal["text", "json"] = "text"
    """Format of stderr and the summaries; the last line of a failure is plain text in both."""

    allow_patterns: Patterns = Field(default=(), validation_alias="STORAGE_ALLOW_PATTERNS")
    """Patterns (fnmatch; `*` crosses `/`) of files to publish. Default: what is loaded, without code.

    This variable and the next one are KServe's own; a JSON list or a comma-separated list.
    """

    ignore_patterns: Patterns = Field(default=(), validation_alias="STORAGE_IGNORE_PATTERNS")
    """Patterns of files to exclude."""

    allow_pickle: bool = False
    """Publish pickled weights if there are no safetensors. A pickle can run code when opened."""

    offline: bool = Field(default=False, validation_alias=AliasChoices(f"{PREFIX}OFFLINE", "HF_HUB_OFFLINE"))
    """Send no requests to the Hub: a branch or tag resolves to its last known commit."""

    adapter_reference: str | None = Field(default=None, validation_alias="ADAPTER_REFERENCE")
    """Reference of a PEFT adapter to publish on the same volumes, as for a model."""

    prepare: Variant | None = None
    """Variant to derive from each snapshot: linear layers quantized to 8 (`int8-cpu`) or 4 bits. Needs torch."""

    prepare_skip_modules: Patterns = ()
    """Patterns of layers not to quantize. A predictor loads the variant only if it skips the same layers."""

    umask: Annotated[int, BeforeValidator(_umask)] = 0o022
    """Octal umask of all files on the volume; the group must be able to read (fsGroup)."""

    parallel_files: int = Field(default=4, ge=1, le=64)
    """Number of parallel downloads. More helps on fast networks and costs memory per file."""

    xet_buffer_mib: int = Field(default=128, ge=16, le=65_536)
    """Memory in MiB that hf_xet may buffer for all files together; its own default is gigabytes."""

    attempts: int = Field(default=6, ge=1, le=100)
    """Number of attempts for each request to the Hub, and for the rest of each file."""

    retry_wait_seconds: float = Field(default=1.0, ge=0.001, le=60, allow_inf_nan=False)
    """First wait between two attempts, doubled each time up to 60 s.

    A `Retry-After` of the Hub replaces it, up to five minutes.
    """

    stall_seconds: float = Field(default=30.0, ge=0.1, le=3600, allow_inf_nan=False)
    """Time without data, or below the minimum throughput, after which a connection is replaced."""

    stall_bytes_per_second: int = Field(default=4096, ge=0)
    """Minimum throughput of a file, averaged over `stall_seconds`."""

    lock_stale_seconds: float = Field(default=30.0, ge=0.1, le=3600, allow_inf_nan=False)
    """Time without heartbeat after which the holder of a lease is considered dead.

    The heartbeat interval is a fifth of it. Increase it for volumes that pause longer.
    """

    lock_timeout_seconds: float = Field(default=7200.0, ge=0, le=604_800, allow_inf_nan=False)
    """Maximum wait for another live initializer that publishes the same snapshot."""

    progress_seconds: float = Field(default=2.0, gt=0, le=3600, allow_inf_nan=False)
    """Interval between two progress lines in a log; a terminal shows a live bar."""


def load(overrides: Mapping[str, object]) -> Settings:
    """Read the settings from the environment; `overrides` are the values of flags, by setting name.

    Raises:
        InvalidUsage: an unknown `STORAGE_INITIALIZER_*` variable or an invalid value.
    """
    variables = known_variables()
    for variable in sorted(os.environ):
        if variable.upper().startswith(PREFIX) and variable.upper() not in variables:
            raise InvalidUsage(f"Unknown setting: {variable}. Unset it, or use one of {', '.join(sorted(variables))}.")
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        raise InvalidUsage(f"{_variable(str(first['loc'][0]))} has an invalid value: {first['msg']}.") from error
    return settings.model_copy(update=overrides)


def redact(text: str) -> str:
    """Replace the tokens of the environment, bearer tokens and passwords in URLs by `***`.

    A second safeguard after `_token` and `_endpoint`, for every log line and the final error. Token words shorter than
    four characters are kept: they are not secret and occur in ordinary text.
    """
    for variable, value in os.environ.items():
        if variable.upper() in _TOKENS:
            for word in sorted(value.split(), key=len, reverse=True):
                if len(word) >= _MIN_SECRET_CHARACTERS:
                    text = text.replace(word, "***").replace(repr(word)[1:-1], "***")
    return _USERINFO.sub(r"\1://***@", _BEARER.sub("Bearer ***", text))


def known_variables() -> frozenset[str]:
    """Return the names of all `STORAGE_INITIALIZER_*` variables."""
    fields = Settings.model_fields.items()
    return frozenset(f"{PREFIX}{name.upper()}" for name, field in fields if not isinstance(field.validation_alias, str))


def _variable(name: str) -> str:
    """Return the variable that set a field, from pydantic's name of the field."""
    alias = {f"{PREFIX}LOG_LEVEL": "LOG_LEVEL", f"{PREFIX}OFFLINE": "HF_HUB_OFFLINE"}.get(name)
    if alias and not any(os.environ[variable] for variable in os.environ if variable.upper() == name):
        return alias
    return name if name.isupper() else f"{PREFIX}{name.upper()}"
