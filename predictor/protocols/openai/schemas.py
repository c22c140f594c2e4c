"""OpenAI's request bodies as pydantic models: types, limits, and errors of fields that are not supported.

Every field of the API is supported or rejected by name; null means absent. Fields without influence on generation are
accepted and ignored: user, metadata, safety_identifier, prompt_cache_*, and parallel_tool_calls, since tool calls are
returned as text. vLLM's extra sampling fields are supported.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from predictor.protocols.json_body import unknown_fields
from predictor.protocols.sampling_fields import MAX_COMPLETIONS, MAX_LOGPROBS, MAX_STOP, SamplingFields, wrap_string

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of max_tokens for completions; for chats it is the model's."""


def _close_and_allow_nulls(schema: dict[str, Any]) -> None:
    """Add to the JSON schema what the validators of `_Object` and `_NestedObject` do."""
    schema["additionalProperties"] = False
    for name, field in schema["properties"].items():
        nullable = any(option.get("type") == "null" for option in field.get("anyOf", [field]))
        if name not in schema.get("required", ()) and not nullable:
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_close_and_allow_nulls)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return {name: field for name, field in value.items() if field is not None} if isinstance(value, dict) else value


class _NestedObject(_Object):
    """Object inside the body; rejects unknown fields itself, so that the error lists its own fields."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.model_extra:
            raise PydanticCustomError("unknown", unknown_fields(self.model_extra, type(self).model_fields))
        return self


def _reject(reason: str, *accepted: object) -> BeforeValidator:
    """Return a validator of an unsupported field that allows the accepted values only."""

    def check(value: object) -> object:
        if value not in accepted:
            raise PydanticCustomError("unsupported", reason)
        return value

    return BeforeValidator(check)


class _TextPart(_NestedObject):
    type: Annotated[Literal["text"], _reject("only text parts are supported, not images, audio or files", "text")]
    text: str
    prompt_cache_breakpoint: dict[str, Any] = {}


def _wrap_text(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _FunctionCall(_NestedObject):
    name: str
    arguments: Json[dict[str, Any]]
    """JSON in a string; chat templates need the object."""


class _ToolCall(_NestedObject):
    id: str
    type: Annotated[Literal["function"], _reject("only function calls are supported", "function")]
    function: _FunctionCall


class _Message(_NestedObject):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[_TextPart], Field(min_length=1, fail_fast=True), BeforeValidator(_wrap_text, str | list[_TextPart])
    ] = []
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[_ToolCall], Field(fail_fast=True)] = []
    reasoning_content: str | None = None
    """Not in the API; read by chat templates of reasoning models."""

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        assistant = self.role == "assistant"
        if not (self.content or (assistant and self.tool_calls)):
            raise PydanticCustomError("content", "content is required, unless the assistant has tool_calls instead")
        if not assistant and (self.tool_calls or self.reasoning_content):
            raise PydanticCustomError("role", "tool_calls and reasoning_content are allowed for role assistant only")
        if (self.role == "tool") is (self.tool_call_id is None):
            raise PydanticCustomError("role", "tool_call_id is required for role tool, and allowed for no other")
        return self

    def to_template_message(self) -> dict[str, Any]:
        """Return the message for the chat template, its text parts concatenated."""
        return {**self.model_dump(exclude_unset=True), "content": "".join(part.text for part in self.content)}


class _FunctionDefinition(_NestedObject):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Literal[False], _reject("arguments are not validated against their schema", False)] = False


class _Tool(_NestedObject):
    type: Annotated[Literal["function"], _reject("only function tools are supported", "function")]
    function: _FunctionDefinition


class _StreamOptions(_NestedObject):
    include_usage: bool = False
    include_obfuscation: Annotated[Literal[False], _reject("obfuscation of streams is not supported", False)] = False


_Text = Annotated[str, Field(min_length=1)]
_Prompt = _Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


def _validate_prompts(prompt: object, validate: Callable[[object], Any]) -> Any:
    """Wrap a single prompt in a list, and report one issue instead of one per type that a prompt may have."""
    single = isinstance(prompt, str) or (isinstance(prompt, list) and isinstance(next(iter(prompt), None), int))
    try:
        return validate([prompt] if single else prompt)
    except ValidationError:
        message = "expected a string, a list of strings, of token ids or of lists of token ids, none of them empty"
        raise PydanticCustomError("prompt", message) from None


class BaseRequest(_Object, SamplingFields):
    """Fields common to completions and chat completions."""

    model: str
    n: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy.")
    stop: Annotated[list[_Text], Field(max_length=MAX_STOP), BeforeValidator(wrap_string, _Text | list[_Text])] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0), _reject("not supported. Omit it", {})] = {}
    user: str | None = None


class CompletionRequest(BaseRequest):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[
        list[_Prompt], Field(min_length=1, fail_fast=True), WrapValidator(_validate_prompts, _Prompt | list[_Prompt])
    ]
    max_tokens: int | None = Field(default=DEFAULT_MAX_TOKENS, ge=1, description="Maximum number of new tokens.")
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    suffix: Annotated[None, _reject("insertion is not supported")] = None


_TOOL_CHOICE = "expected none or auto. Tool calls cannot be required: they are returned as text"
_TEXT: dict[Literal["type"], Literal["text"]] = {"type": "text"}
_TEXT_FORMAT = 'expected {"type": "text"}; json_object and json_schema are not supported'


class ChatCompletionRequest(BaseRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Maximum number of new tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[_Tool], Field(fail_fast=True)] = []
    tool_choice: Annotated[Literal["none", "auto"], _reject(_TOOL_CHOICE, "none", "auto")] = "auto"
    response_format: Annotated[dict[Literal["type"], Literal["text"]], _reject(_TEXT_FORMAT, _TEXT)] = _TEXT
    modalities: Annotated[list[Literal["text"]], _reject("only text is generated", ["text"])] = ["text"]
    service_tier: Literal["auto", "default"] | None = None
    store: Annotated[Literal[False], _reject("completions are not stored", False)] = False
    audio: Annotated[None, _reject("only text is generated")] = None
    function_call: Annotated[None, _reject("deprecated and not supported. Use tool_choice")] = None
    functions: Annotated[None, _reject("deprecated and not supported. Use tools")] = None
    moderation: Annotated[None, _reject("moderation is not supported")] = None
    prediction: Annotated[None, _reject("predicted outputs are not supported")] = None
    reasoning_effort: Annotated[None, _reject("not supported. Put it into a message")] = None
    verbosity: Annotated[None, _reject("not supported. Put it into a message")] = None
    web_search_options: Annotated[None, _reject("web search is not supported")] = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] = {}
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: str | None = None
