"""Settings of the predictor, read from command-line flags and environment variables.

Each setting is a flag (`--http_port 8080`; dashes work too) and a variable (`PREDICTOR_HTTP_PORT`); the flag wins.
Unknown flags and unknown `PREDICTOR_*` variables are errors, so that a misspelled setting is not silently ignored.
`OTEL_*` variables are read by OpenTelemetry's SDK if `tracing` is on.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from predictor.errors import InvalidSettings

ENV_PREFIX = "PREDICTOR_"
_SERVICE_LINK = re.compile(r"PREDICTOR_(SERVICE_(HOST|PORT)|PORT(_\d+_(TCP|UDP))?)(_\w+)?")
"""Variables that Kubernetes sets in every pod of a namespace with a Service named `predictor`."""


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
    """Model name in URLs and responses, as in /v2/models/NAME. No slashes."""
    model_dir: Path = Path("/mnt/models")
    """Snapshot directory or, with a model reference, root of the volume that contains it."""
    model_reference: str | None = Field(
        default=None, validation_alias=AliasChoices("model_reference", "PREDICTOR_MODEL_REFERENCE", "MODEL_REFERENCE")
    )
    """Reference of the snapshot below model_dir, hf://owner/model[:revision], as for the storage initializer."""
    adapter_reference: str | None = Field(
        default=None,
        validation_alias=AliasChoices("adapter_reference", "PREDICTOR_ADAPTER_REFERENCE", "ADAPTER_REFERENCE"),
    )
    """Reference of a LoRA adapter on the same volume, merged into the model while it loads. Needs model_reference."""
    snapshot_wait_seconds: float = Field(default=0, ge=0)
    """Maximum time to wait until the snapshot is published, in seconds."""
    hold_while_loading: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Maximum time to hold a request while the model loads, in seconds, instead of responding 503. 0: off."""
    ready_while_loading: bool = False
    """Be ready while the model loads, so that requests arrive and are held. Needs hold_while_loading."""
    load_time_file: Path | None = None
    """File with the duration of the last load, for Retry-After. Default: none; the progress of the load is used."""
    task: Literal["auto", "generate", "embed", "classify"] = "auto"
    """What the model does: generate text, embed or classify texts. auto: what the snapshot's files show."""
    device: str = "auto"
    """Device of the model: auto, cuda, cuda:N, mps or cpu. auto: the first available of cuda, mps, cpu."""
    tensor_parallel_size: int | Literal["auto"] = 1
    """Number of devices that share the model by tensor parallelism. auto: all visible GPUs. On a CPU: processes."""
    num_threads: int | None = Field(default=None, ge=1)
    """Number of torch CPU threads, of each process. Default: the container's CPU limit, else all cores, shared."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights. auto: the checkpoint's, if the device computes in it."""
    quantization: Literal["auto", "none", "8bit", "4bit", "fp8"] = "none"
    """Weight quantization of linear layers. none: off. auto: the fastest mode that fits in memory."""
    quantization_skip_modules: str = ""
    """Additional linear layers to leave unquantized: comma-separated parts of their names, as in lm_head,down_proj."""
    quantization_fallback: bool = False
    """Load unquantized weights, with a warning, if the quantization is unavailable. Default: fail."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights. Only for snapshots whose code you have reviewed."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Maximum number of tokens of prompt and completion together. Default: the model's context length."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Maximum number of sequences in a batch; further ones are queued."""
    max_queued_requests: int = Field(default=128, ge=0)
    """Maximum number of queued sequences; further requests are rejected with 429."""
    max_num_batched_tokens: int = Field(default=512, ge=1)
    """Maximum number of tokens per step; longer prompts are split into chunks, so that other sequences continue."""
    kv_cache_tokens: int | None = Field(default=None, ge=256)
    """Capacity of the KV cache in tokens, over all sequences. Default: computed from free memory."""
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """Data type of the KV cache. auto: the model's. int8: half the memory, faster long contexts; on a CPU only."""
    kv_cache_memory_fraction: float = Field(default=0.8, gt=0, le=1)
    """Fraction of the memory left after loading the weights, of the GPU or the container, for KV cache and steps."""
    enforce_eager: bool = False
    """Compute no step as a CUDA graph: slower, for models that fail or err with them."""
    speculation: Literal["auto", "none", "prompt_lookup"] = "auto"
    """Guess tokens that repeat earlier text, and verify them in one step: same answers, faster. auto: where exact."""
    default_max_tokens: int = Field(default=256, ge=1)
    """Maximum number of new tokens if neither the request nor the model's generation config sets one."""
    chat_template_kwargs: str = "{}"
    """Variables of the model's chat template, as JSON: {"enable_thinking": false}. Those of a request replace them."""
    tool_call_format: Literal[
        "auto",
        "none",
        "deepseek_v3",
        "deepseek_v31",
        "gemma3",
        "gemma4",
        "glm45",
        "harmony",
        "hermes",
        "kimi_k2",
        "llama3_json",
        "mistral",
        "mistral_list",
        "pythonic",
        "qwen3_coder",
    ] = "auto"
    """Notation of the model's tool calls. auto: what the tokenizer or the chat template shows. none: calls are text."""
    reasoning_format: Literal["auto", "none", "deepseek_r1", "gemma4", "harmony", "mistral", "think"] = "auto"
    """Notation of the model's reasoning. auto: what the tokenizer or the chat template shows. none: it is text."""
    request_timeout_seconds: float = Field(default=590, gt=0, allow_inf_nan=False)
    """Request timeout in seconds. Keep it below the InferenceService's, so that clients get an error response."""
    max_request_bytes: int = Field(default=8_388_608, ge=1024)
    """Maximum size of a request body in bytes."""
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """Unknown fields of requests: ignore and name them in the header x-ignored-fields and the log, or refuse them."""
    step_timeout_seconds: float = Field(default=120, gt=0, allow_inf_nan=False)
    """Time without a step, while sequences run, after which liveness fails and Kubernetes restarts the pod."""
    self_check_interval_seconds: float = Field(default=60, ge=0, allow_inf_nan=False)
    """Interval of the self-check while idle, in seconds; readiness fails after three without success. 0: off."""
    shutdown_delay_seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Time after SIGTERM in which new requests are still served, in seconds, until proxies have removed the server."""
    shutdown_grace_seconds: int = Field(default=600, ge=0)
    """Maximum time for running requests after it, in seconds. Both together at most the InferenceService's timeout."""
    api_keys_file: Path | None = None
    """File of bearer keys with weights and limits, one `name:key` per line, reloaded when it changes. Default: none."""
    allowed_origins: str = ""
    """Origins of web pages that may send requests (CORS): comma-separated, as in https://ui.example.org, or *."""
    playground: bool = True
    """Serve a page to talk to the model, to browsers that request /. It contains no secret, and sends API requests."""
    host: IPv4Address | None = None
    """IPv4 address of the ports. 127.0.0.1: only programs of this machine reach them, not probes. Default: all."""
    http_port: int = Field(default=8080, ge=1, le=65535)
    """TCP port of the HTTP server."""
    enable_grpc: bool = False
    """Serve the Open Inference Protocol over gRPC too."""
    grpc_port: int = Field(default=8081, ge=1, le=65535)
    """TCP port of the gRPC server."""
    enable_admin_routes: bool = False
    """Enable KServe's routes to load and unload models, for all clients that reach the port."""
    tracing: bool = False
    """Export OpenTelemetry traces over OTLP/HTTP; configure with OTEL_* variables."""
    log_format: Literal["text", "json"] = "text"
    """Format of log lines."""
    log_prompts: bool = False
    """Log prompts; they may be private."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", validation_alias=AliasChoices("log_level", "PREDICTOR_LOG_LEVEL", "LOG_LEVEL")
    )
    """Minimum level of log lines."""

    @property
    def skip_modules(self) -> tuple[str, ...]:
        """`quantization_skip_modules` as a tuple."""
        return tuple(part.strip() for part in self.quantization_skip_modules.split(",") if part.strip())

    @property
    def template_variables(self) -> dict[str, Any]:
        """`chat_template_kwargs` as a dictionary."""
        return dict(json.loads(self.chat_template_kwargs))

    @property
    def origins(self) -> tuple[str, ...]:
        """`allowed_origins` as a tuple."""
        return tuple(origin.strip().lower() for origin in self.allowed_origins.split(",") if origin.strip())

    @field_validator("chat_template_kwargs", mode="after")
    @classmethod
    def _is_json_object(cls, value: str) -> str:
        try:
            is_object = isinstance(json.loads(value), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise PydanticCustomError("json", 'Input should be a JSON object, as in {"enable_thinking": false}')
        return value

    @field_validator("model_reference", "adapter_reference", mode="after")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("device", mode="after")
    @classmethod
    def _is_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            expected = {"expected": "auto, cuda, cuda:N, mps or cpu"}
            raise PydanticCustomError("device", "Input should be {expected}", expected)
        return value

    @field_validator("tensor_parallel_size", mode="before")
    @classmethod
    def _is_size(cls, value: object) -> object:
        if value != "auto" and not re.fullmatch("0*[1-9][0-9]*", str(value)):
            raise PydanticCustomError("size", "Input should be auto or a positive integer")
        return value

    @field_validator("allowed_origins", mode="after")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        for origin in filter(None, map(str.strip, value.split(","))):
            if origin != "*" and not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._:\[\]-]+", origin):
                raise PydanticCustomError(
                    "origin", "Input should be * or origins without a path, as in https://ui.example.org,http://a:3000"
                )
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value


_AnySettings = TypeVar("_AnySettings", bound=Settings)


def read(argv: Sequence[str]) -> Settings:
    """Return the settings from flags, without the program's name, and the environment; `--help` prints all and exits.

    Raises:
        InvalidSettings: naming the flag or variable, and the fix.
    """
    _reject_unknown_variables(os.environ, Settings)
    settings = parse(argv, Settings)
    _require_consistent(settings)
    return settings


def from_arguments(arguments: Mapping[str, Any], model: type[_AnySettings]) -> _AnySettings:
    """Return the settings from values or texts by name, and the environment; an argument wins.

    Raises:
        InvalidSettings: naming the argument or variable, and the fix.
    """
    _reject_unknown_variables(os.environ, model)
    for name in arguments:
        if name not in model.model_fields:
            raise InvalidSettings(f"Unknown setting: {name}. {_suggestion(name, '', set(model.model_fields))}")
    with _naming_values():
        settings = model(**arguments)
    _require_consistent(settings)
    return settings


def _require_consistent(settings: Settings) -> None:
    if settings.ready_while_loading and not settings.hold_while_loading:
        raise InvalidSettings(
            "--ready_while_loading: requests that arrive would get 503. Set --hold_while_loading too."
        )
    if settings.adapter_reference and not settings.model_reference:
        raise InvalidSettings(
            "--adapter_reference: adapters are on the volume of a published model. Set --model_reference too."
        )


def parse(argv: Sequence[str], model: type[Settings]) -> Settings:
    """Return the settings from flags and from the sources of `model`; `read` and preflight use different ones.

    Raises:
        InvalidSettings: naming the flag or variable, and the fix.
    """
    arguments = [_with_underscores(argument) for argument in argv]
    try:
        with _naming_values():
            return CliApp.run(model, cli_args=arguments)
    except SettingsError as error:
        _reject_unknown_flags(arguments)
        raise InvalidSettings(f"Invalid command line: {error}. Run `python -m predictor --help`.") from None


@contextmanager
def _naming_values() -> Iterator[None]:
    """Convert pydantic's errors to `InvalidSettings`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).removeprefix(ENV_PREFIX).lower()
        raise InvalidSettings(
            f"Invalid value of --{name} ({ENV_PREFIX}{name.upper()}): {first['input']!r}. {first['msg']}."
        ) from None


def _reject_unknown_variables(variables: Iterable[str], model: type[Settings]) -> None:
    names = {ENV_PREFIX + name.upper() for name in model.model_fields}
    for variable in sorted(variables):
        name = variable.upper()  # pydantic-settings ignores case
        if name.startswith(ENV_PREFIX) and name not in names and not _SERVICE_LINK.fullmatch(name):
            raise InvalidSettings(f"Unknown variable: {variable}. {_suggestion(name, ENV_PREFIX, names)}")


def _reject_unknown_flags(arguments: Iterable[str]) -> None:
    for argument in arguments:
        flag = argument.partition("=")[0]
        prefix = "--no-" if flag.startswith("--no-") else "--"
        flags = {prefix + name for name in Settings.model_fields}
        if flag.startswith("--") and flag not in flags:
            raise InvalidSettings(f"Unknown flag: {flag}. {_suggestion(flag, prefix, flags)}") from None


def _with_underscores(argument: str) -> str:
    """Return `--http-port=1` as `--http_port=1`, `--no-enable-grpc` as `--no-enable_grpc`; values are unchanged."""
    if not argument.startswith("--"):
        return argument
    prefix = "--no-" if argument.startswith("--no-") else "--"
    name, equals, value = argument.removeprefix(prefix).partition("=")
    return f"{prefix}{name.replace('-', '_')}{equals}{value}"


def _suggestion(name: str, prefix: str, names: set[str]) -> str:
    """Return the fix for a misspelled name; the common prefix does not count as similarity."""
    suffixes = [other.removeprefix(prefix) for other in names]
    similar = difflib.get_close_matches(name.removeprefix(prefix), suffixes, n=1, cutoff=0.7)
    return f"Did you mean {prefix}{similar[0]}?" if similar else "`python -m predictor --help` lists all settings."
