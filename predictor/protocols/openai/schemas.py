"""The fields of OpenAI's request bodies: their types, their limits, and why one is refused.

Every field of the API is served with its meaning or refused by name, and null means absent. Labels, which have no
influence on what is generated, are taken as they are: user, metadata, safety_identifier, all of prompt_cache_*, and
parallel_tool_calls, since tool calls come as text and are never split. vLLM's extra sampling fields are served, too.
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

from predictor.protocols.sampling_fields import MAX_COMPLETIONS, MAX_LOGPROBS, MAX_STOPS, Sampling

COMPLETION_TOKENS = 16
"""The API's default for max_tokens of completions; a chat's is the model's own."""


def _closed_and_nullable(described: dict[str, Any]) -> None:
    """Put into an object's JSON schema what `_Object` and `_Inner` do."""
    described["additionalProperties"] = False
    for name, field in described["properties"].items():
        nullable = any(option.get("type") == "null" for option in field.get("anyOf", [field]))
        if name not in described.get("required", ()) and not nullable:
            described["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_closed_and_nullable)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return {name: field for name, field in value.items() if field is not None} if isinstance(value, dict) else value


class _Inner(_Object):
    """An object inside the body: refuses unknown fields itself, to suggest its own and not the body's."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.model_extra:
            names, known = ", ".join(self.model_extra), ", ".join(sorted(type(self).model_fields))
            raise PydanticCustomError("unknown", f"{names}: not known here; known are {known}")
        return self


def _refuse(why: str, *accepted: object) -> BeforeValidator:
    """Marks a field that is not served, but for the values accepted."""

    def check(value: object) -> object:
        if value not in accepted:
            raise PydanticCustomError("refused", why)
        return value

    return BeforeValidator(check)


class _TextPart(_Inner):
    type: Annotated[Literal["text"], _refuse("only text parts are served; images, audio and files are not", "text")]
    text: str
    prompt_cache_breakpoint: dict[str, Any] = {}


def _parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Call(_Inner):
    name: str
    arguments: Json[dict[str, Any]]
    """On the wire JSON in a string; chat templates take an object."""


class _ToolCall(_Inner):
    id: str
    type: Annotated[Literal["function"], _refuse("only function calls are served", "function")]
    function: _Call


class _Message(_Inner):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[_TextPart], Field(min_length=1, fail_fast=True), BeforeValidator(_parts, str | list[_TextPart])
    ] = []
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[_ToolCall], Field(fail_fast=True)] = []
    reasoning_content: str | None = None
    """Not of the API, but what templates of reasoning models read of the assistant's earlier turns."""

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        assistant = self.role == "assistant"
        if not (self.content or (assistant and self.tool_calls)):
            raise PydanticCustomError("content", "content is required, unless the assistant has tool_calls instead")
        if not assistant and (self.tool_calls or self.reasoning_content):
            raise PydanticCustomError("role", "tool_calls and reasoning_content are the assistant's alone")
        if (self.role == "tool") is (self.tool_call_id is None):
            raise PydanticCustomError("role", "tool_call_id belongs to every message of role tool, and to no other")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message with its parts as one text, nothing put between them."""
        return {**self.model_dump(exclude_unset=True), "content": "".join(part.text for part in self.content)}


class _Function(_Inner):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Literal[False], _refuse("arguments are not held to their schema", False)] = False


class _Tool(_Inner):
    type: Annotated[Literal["function"], _refuse("only function tools are served", "function")]
    function: _Function


class _StreamOptions(_Inner):
    include_usage: bool = False
    include_obfuscation: Annotated[Literal[False], _refuse("events are not padded", False)] = False


_Text = Annotated[str, Field(min_length=1)]
_Prompt = _Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


def _stops(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _prompts(prompt: object, validate: Callable[[object], Any]) -> Any:
    """One prompt as a list of one, and one issue for a prompt that is neither text nor token ids."""
    single = isinstance(prompt, str) or (isinstance(prompt, list) and isinstance(next(iter(prompt), None), int))
    try:
        return validate([prompt] if single else prompt)
    except ValidationError:
        why = "expected a string, a list of strings, of token ids or of lists of token ids, none of them empty"
        raise PydanticCustomError("prompt", why) from None


class Body(_Object, Sampling):
    """What completions and chats have in common."""

    model: str
    n: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy.")
    stop: Annotated[list[_Text], Field(max_length=MAX_STOPS), BeforeValidator(_stops, _Text | list[_Text])] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0), _refuse("not served; leave it out", {})] = {}
    user: str | None = None


class Completions(Body):
    """What continues prompts."""

    prompt: Annotated[
        list[_Prompt], Field(min_length=1, fail_fast=True), WrapValidator(_prompts, _Prompt | list[_Prompt])
    ]
    max_tokens: int | None = Field(default=COMPLETION_TOKENS, ge=1, description="New tokens at most.")
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    suffix: Annotated[None, _refuse("text is continued, never inserted")] = None


_TOOL_CHOICE = "expected none or auto; a call cannot be required, as calls are not parsed: the answer comes as text"
_TEXT: dict[Literal["type"], Literal["text"]] = {"type": "text"}
_TEXT_FORMAT = 'expected {"type": "text"}; json_object and json_schema are not enforced here'


class Chats(Body):
    """What answers messages."""

    messages: Annotated[list[_Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, description="New tokens at most.")
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[_Tool], Field(fail_fast=True)] = []
    tool_choice: Annotated[Literal["none", "auto"], _refuse(_TOOL_CHOICE, "none", "auto")] = "auto"
    response_format: Annotated[dict[Literal["type"], Literal["text"]], _refuse(_TEXT_FORMAT, _TEXT)] = _TEXT
    modalities: Annotated[list[Literal["text"]], _refuse("only text is generated", ["text"])] = ["text"]
    service_tier: Literal["auto", "default"] | None = None
    store: Annotated[Literal[False], _refuse("completions are not stored", False)] = False
    audio: Annotated[None, _refuse("only text is generated")] = None
    function_call: Annotated[None, _refuse("deprecated, and not served; use tool_choice")] = None
    functions: Annotated[None, _refuse("deprecated, and not served; use tools")] = None
    moderation: Annotated[None, _refuse("nothing is moderated here")] = None
    prediction: Annotated[None, _refuse("predicted outputs are not served")] = None
    reasoning_effort: Annotated[None, _refuse("not served; ask for it in a message")] = None
    verbosity: Annotated[None, _refuse("not served; ask for it in a message")] = None
    web_search_options: Annotated[None, _refuse("there is no web search here")] = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] = {}
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: str | None = None
