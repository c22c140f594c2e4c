"""Body of `POST /v1/responses` as pydantic models: types and limits of the supported fields.

`field_tables` has the fields that have no effect or are refused. vLLM's extra sampling fields are supported.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from predictor.protocols.field_tables import HARMLESS_ITEM, HARMLESS_RESPONSE, REFUSED_RESPONSE
from predictor.protocols.field_validators import ReasoningEffort, wrap_text
from predictor.protocols.json_object import JSONObject
from predictor.protocols.openai.schemas import CallArguments
from predictor.protocols.openai.tool_fields import ToolFields
from predictor.protocols.sampling_fields import MAX_LOGPROBS, MAX_TOKENS, MaxTokens, SamplingFields
from predictor.protocols.structured_output_fields import json_schema_output
from predictor.types import StructuredOutput

_TextType = Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]


def _to_text_part(part: object) -> object:
    """Return a refusal, which clients send back with the conversation, as text; refuse parts that are not text."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "refusal":
        return {**part, "type": "output_text", "text": part.get("refusal")}
    if part.get("type") not in get_args(_TextType):
        raise PydanticCustomError("unsupported", "only text parts are supported, not images, audio or files")
    return part


class _TextPart(JSONObject):
    harmless = HARMLESS_ITEM

    type: _TextType
    text: str


_Texts = Annotated[list[Annotated[_TextPart, BeforeValidator(_to_text_part, _TextPart)]], Field(fail_fast=True)]
_Content = Annotated[_Texts, BeforeValidator(wrap_text, str | list[_TextPart])]


class _Item(JSONObject):
    harmless = HARMLESS_ITEM


class MessageItem(_Item):
    """A message; `type` may be absent."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content


class FunctionCallItem(_Item):
    """A call by the assistant."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: CallArguments = {}


class FunctionCallOutputItem(_Item):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: _Content


class ReasoningItem(_Item):
    """Reasoning of the assistant before its message or calls."""

    type: Literal["reasoning"]
    content: _Texts = []
    summary: _Texts = []


_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def _item_type(item: Any) -> str:
    if isinstance(item, _Item):
        return str(vars(item)["type"])
    return str(item.get("type") or ("message" if "role" in item else "item_reference"))


def _check_item_type(item: object) -> object:
    """Raise with the type of an item that is not supported."""
    if not isinstance(item, dict):
        raise PydanticCustomError("item", "input should be an object")
    kind = _item_type(item)
    if kind == "item_reference":
        raise PydanticCustomError("unsupported", "item_reference: items are not stored. Send the item itself")
    if kind not in _ITEM_TYPES:
        raise PydanticCustomError(
            "unsupported",
            "an item of type {type} is not supported. Use message, function_call, function_call_output or reasoning",
            {"type": kind[:80]},
        )
    return item


_AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
]
InputItem = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem


def _wrap_input(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _check_tool_type(tool: object) -> object:
    """Raise with the type of a tool that is not supported."""
    if isinstance(tool, dict) and tool.get("type") != "function":
        raise PydanticCustomError(
            "unsupported",
            "a tool of type {type} is not supported, and no tool runs on the server. Use tools of type function",
            {"type": str(tool.get("type"))[:80]},
        )
    return tool


class _Tool(JSONObject):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False
    """Unlike in OpenAI's API, where schemas are strict by default: not every schema can be enforced."""

    def to_chat_tool(self) -> dict[str, Any]:
        """Return the tool in the form of chat completions."""
        function = self.model_dump(exclude_unset=True, exclude={"type"})
        return {"type": "function", "function": function}

    def to_json(self) -> dict[str, Any]:
        """Return it as a field of the response."""
        return {"parameters": None, "strict": self.strict, **self.model_dump(exclude_unset=True)}


class _AllowedTool(JSONObject):
    type: Literal["function"]
    name: str


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _wrap_choice(choice: object) -> object:
    return {"type": choice} if isinstance(choice, str) else choice


class _ToolChoice(JSONObject):
    type: str
    name: str | None = None
    """Of the function, for type function."""
    mode: Literal["auto", "required"] = "auto"
    """For type allowed_tools, as are the tools."""
    tools: list[Annotated[_AllowedTool, BeforeValidator(_check_tool_type, _AllowedTool)]] = []

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if self.type == "function" and not self.name:
            raise PydanticCustomError("name", "type function needs a name")
        if self.type == "allowed_tools" and not self.tools:
            raise PydanticCustomError("tools", "type allowed_tools needs tools")
        if self.type not in ("none", "auto", "required", "function", "allowed_tools"):
            raise PydanticCustomError(
                "unsupported",
                "{type} is not supported. Use none, auto, required, or an object of type function or allowed_tools",
                {"type": self.type[:80]},
            )
        return self

    def to_chat_choice(self) -> str | dict[str, Any]:
        """Return it in the form of chat completions."""
        match self.type:
            case "function":
                return _named(str(self.name))
            case "allowed_tools":
                tools = [_named(tool.name) for tool in self.tools]
                return {"type": self.type, "allowed_tools": {"mode": self.mode, "tools": tools}}
        return self.type

    def to_json(self) -> str | dict[str, Any]:
        """Return it as a field of the response."""
        return self.type if self.type in ("none", "auto", "required") else self.model_dump(exclude_unset=True)


class _TextFormat(JSONObject):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    """The text always follows the schema."""

    @model_validator(mode="after")
    def _require_schema(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise PydanticCustomError("schema", "type json_schema needs a schema")
        return self

    def structured_output(self) -> StructuredOutput | None:
        """Return what the text must follow; None if nothing."""
        if self.type == "text":
            return None
        return json_schema_output({"type": "object"} if self.schema_ is None else self.schema_)

    def to_json(self) -> dict[str, Any]:
        """Return it as a field of the response."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"name": self.name, **self.model_dump(by_alias=True, exclude_none=True)}


class _Text(JSONObject):
    format: _TextFormat = _TextFormat()
    verbosity: Literal["low", "medium", "high"] = "medium"
    """Reported in the response, without effect."""


class _Reasoning(JSONObject):
    harmless = frozenset({"context", "generate_summary", "mode", "summary"})

    effort: ReasoningEffort = ""
    """For chat templates with such a variable. `none` turns the reasoning off."""


class ResponseRequest(SamplingFields):
    """Body of `POST /v1/responses`."""

    harmless = HARMLESS_RESPONSE
    refused = {**SamplingFields.refused, **REFUSED_RESPONSE}

    model: str
    input: Annotated[
        list[Annotated[_AnyItem, BeforeValidator(_check_item_type, _AnyItem)]],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_wrap_input, str | list[_AnyItem]),
    ]
    instructions: str | None = None
    tools: Annotated[list[Annotated[_Tool, BeforeValidator(_check_tool_type, _Tool)]], Field(fail_fast=True)] = []
    tool_choice: Annotated[
        _ToolChoice, BeforeValidator(_wrap_choice, Literal["none", "auto", "required"] | _ToolChoice)
    ] = _ToolChoice(type="auto")
    parallel_tool_calls: bool = True
    text: _Text = _Text()
    reasoning: _Reasoning = _Reasoning()
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy.")
    max_output_tokens: MaxTokens | None = Field(default=None, description=MAX_TOKENS)
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)
    include: list[
        Literal[
            "code_interpreter_call.outputs",
            "computer_call_output.output.image_url",
            "file_search_call.results",
            "message.input_image.image_url",
            "message.output_text.logprobs",
            "reasoning.encrypted_content",
            "web_search_call.action.sources",
            "web_search_call.results",
        ]
    ] = []
    stream: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    """Not in OpenAI's API: variables of the model's chat template, such as `enable_thinking`."""
    max_tool_calls: int | None = None
    """Of tools that run on a server, of which there are none. Reported in the response, as are those that follow."""
    metadata: dict[str, str] = {}
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    def tool_fields(self) -> dict[str, Any]:
        """Return the arguments of `Chat` that describe tools.

        Raises:
            InvalidRequest: as `ToolFields.chat_fields`.
        """
        fields = {
            "tools": [tool.to_chat_tool() for tool in self.tools],
            "tool_choice": self.tool_choice.to_chat_choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        return ToolFields.model_validate(fields).chat_fields()

    def _constraints(self) -> dict[str, StructuredOutput | None]:
        return {**super()._constraints(), "text.format": self.text.format.structured_output()}
