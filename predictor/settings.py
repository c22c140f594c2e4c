"""What the predictor can be told, and the only reader of argv and environment.

Every setting is a flag (`--http_port 8080`, dashes work too) and a variable (`PREDICTOR_HTTP_PORT`); the flag wins.
Unknown flags and unknown `PREDICTOR_*` variables are errors: a misspelt setting must not be silently ignored. Variables
`OTEL_*` are no settings of ours: OpenTelemetry's SDK reads them, where `tracing` is on.
"""

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from predictor.errors import InvalidSettings

ENV_PREFIX = "PREDICTOR_"
_SERVICE_LINK = re.compile(r"PREDICTOR_(SERVICE_(HOST|PORT)|PORT(_\d+_(TCP|UDP))?)(_\w+)?")
"""What Kubernetes puts into every pod of a namespace that has a Service named `predictor`."""


class Settings(BaseSettings):
    """Serve a HuggingFace LLM from a directory, over KServe's model server."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        cli_prog_name="python -m predictor",
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
    )

    served_model_name: str = Field(default="model", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in the URLs, /v2/models/NAME; no slash, since it is a path segment."""
    model_dir: Path = Path("/mnt/models")
    """A snapshot directory, or, with a model reference, the root of the volume that holds it."""
    model_reference: str | None = Field(
        default=None, validation_alias=AliasChoices("model_reference", "PREDICTOR_MODEL_REFERENCE", "MODEL_REFERENCE")
    )
    """What the storage initializer was told, hf://owner/model[:revision]; finds the snapshot below model_dir."""
    snapshot_wait_seconds: float = Field(default=0, ge=0)
    """How long to wait for the snapshot to be published before giving up, in seconds."""
    http_port: int = Field(default=8080, ge=1, le=65535)
    """TCP port of the HTTP server."""
    device: str = "auto"
    """Where the model runs: auto takes the first of cuda, mps, cpu that is there; cuda:1 is the second GPU."""
    num_threads: int | None = Field(default=None, ge=1)
    """Of torch on a CPU; default: as many as the container's CPU limit, else the machine's cores."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto keeps the checkpoint's own where the device computes in it."""
    quantization: Literal["auto", "none", "8bit", "4bit"] = "none"
    """Bits of the weights of linear layers: none leaves them as they are, auto takes what fits and is fastest."""
    quantization_skip_modules: str = ""
    """Linear layers to leave as they are, too: parts of their names with commas between, as in lm_head,down_proj."""
    quantization_fallback: bool = False
    """Go on with the weights as they are, and a warning, where the quantization cannot be had; else an error."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights. Only for snapshots whose code you have read."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Tokens of prompt and completion together at most; default: the model's own context."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Sequences that are decoded together in one batch at most; the others wait."""
    max_queued_requests: int = Field(default=128, ge=0)
    """Sequences that may wait for a place in the batch; requests beyond are refused at once, with 429."""
    max_num_batched_tokens: int = Field(default=512, ge=1)
    """Tokens computed in one step at most; longer prompts are spread over steps so that other sequences go on."""
    kv_cache_tokens: int | None = Field(default=None, ge=256)
    """Capacity of the KV cache in tokens, over all sequences; default: from the memory that is free."""
    kv_cache_memory_fraction: float = Field(default=0.8, gt=0, le=1)
    """Share of the memory that is free beside the weights, within the container's limit, for the KV cache."""
    default_max_tokens: int = Field(default=256, ge=1)
    """New tokens at most where neither the request nor the model's generation config says."""
    request_timeout_seconds: float = Field(default=590, gt=0, allow_inf_nan=False)
    """How long a request may take, in seconds; below the InferenceService's timeout, so that the answer says why."""
    max_request_bytes: int = Field(default=8_388_608, ge=1024)
    """Largest body of a request, in bytes."""
    step_timeout_seconds: float = Field(default=120, gt=0, allow_inf_nan=False)
    """A step loop that has work and makes no step for so long is not live any more: the cluster restarts it."""
    self_check_interval_seconds: float = Field(default=60, ge=0, allow_inf_nan=False)
    """Period of the background self-check while idle, in seconds; without success for three, not ready. 0: off."""
    shutdown_grace_seconds: int = Field(default=600, ge=0)
    """How long running requests may go on after SIGTERM, in seconds; keep it at the InferenceService's timeout."""
    api_keys_file: Path | None = None
    """Bearer keys, one `name:key` per line, read again when the file changes; default: no key is asked for."""
    enable_grpc: bool = False
    """Serve the Open Inference Protocol over gRPC too."""
    grpc_port: int = Field(default=8081, ge=1, le=65535)
    """TCP port of the gRPC server."""
    enable_admin_routes: bool = False
    """Open KServe's routes to load and unload models, which anyone who reaches the port may then use."""
    tracing: bool = False
    """Tell OpenTelemetry of every request, by OTLP over HTTP; where its collector is, its own variables OTEL_* say."""
    log_format: Literal["text", "json"] = "text"
    """Log lines as text or as JSON objects."""
    log_prompts: bool = False
    """Write prompts into the log; they may be private."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", validation_alias=AliasChoices("log_level", "PREDICTOR_LOG_LEVEL", "LOG_LEVEL")
    )
    """Least severe log lines that are written."""

    @property
    def skip_modules(self) -> tuple[str, ...]:
        """`quantization_skip_modules`, part by part."""
        return tuple(part.strip() for part in self.quantization_skip_modules.split(",") if part.strip())

    @field_validator("model_reference", mode="after")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("device", mode="after")
    @classmethod
    def _is_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            raise PydanticCustomError("device", "should be auto, cuda, cuda:N, mps or cpu")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value


def read(argv: Sequence[str]) -> Settings:
    """The settings from flags and environment.

    Args:
        argv: the flags, without the program's name; `--help` prints them all and exits.

    Raises:
        InvalidSettings: naming the flag or variable and what was expected.
    """
    _refuse_unknown_variables(os.environ)
    try:
        return Settings(_cli_parse_args=[_with_underscores(argument) for argument in argv])
    except SettingsError as error:
        _refuse_flags(str(error))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).removeprefix(ENV_PREFIX).lower()
        raise InvalidSettings(
            f"--{name} ({ENV_PREFIX}{name.upper()}) is {first['input']!r}: {_lower_first(first['msg'])}."
        ) from None


def _refuse_unknown_variables(variables: Iterable[str]) -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for variable in sorted(variables):
        name = variable.upper()  # pydantic-settings reads lower case as well
        if name.startswith(ENV_PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(name):
            raise InvalidSettings(f"{variable} is not a setting; {_suggestion(name, ENV_PREFIX, known)}.")


def _refuse_flags(message: str) -> NoReturn:
    unknown = re.search(r"unrecognized arguments: (--)?(\S+)", message)
    if unknown and unknown[1]:
        flag = f"--{unknown[2].partition('=')[0]}"
        prefix = "--no-" if flag.startswith("--no-") else "--"
        known = {prefix + name for name in Settings.model_fields}
        raise InvalidSettings(f"{flag} is not a flag; {_suggestion(flag, prefix, known)}.") from None
    if unknown:
        raise InvalidSettings(f"{unknown[2]!r} stands alone; values follow a flag, as in --model_dir DIR.") from None
    raise InvalidSettings(f"{message.removeprefix('error parsing CLI: ')}; `python -m predictor --help` lists them.")


def _suggestion(name: str, prefix: str, known: set[str]) -> str:
    """What all names begin with makes none of them alike."""
    rests = [other.removeprefix(prefix) for other in known]
    close = difflib.get_close_matches(name.removeprefix(prefix), rests, n=1, cutoff=0.7)
    return f"did you mean {prefix}{close[0]}" if close else "`python -m predictor --help` lists them all"


def _with_underscores(argument: str) -> str:
    """`--http-port=1` as `--http_port=1`, `--no-enable-grpc` as `--no-enable_grpc`; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    prefix = "--no-" if argument.startswith("--no-") else "--"
    flag, equals, value = argument.removeprefix(prefix).partition("=")
    return f"{prefix}{flag.replace('-', '_')}{equals}{value}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
