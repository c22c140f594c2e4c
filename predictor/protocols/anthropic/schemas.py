"""Anthropic's request bodies as pydantic models: types and limits of the supported fields.

vLLM's extra sampling fields are supported as in the other protocols.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from predictor.protocols.field_tables import HARMLESS, REFUSED_BLOCK, REFUSED_MESSAGES, REFUSED_PARAMETERS
from predictor.protocols.field_validators import ReasoningEffort, reject, wrap_text
from predictor.protocols.json_object import JSONObject
from predictor.protocols.sampling_fields import MAX_TOKENS, MaxTokens, SamplingFields, Stop


class TextBlock(JSONObject):
    """Text in a message."""

    refused = REFUSED_BLOCK

    type: Literal["text"]
    text: str


class ThinkingBlock(JSONObject):
    """Reasoning of the assistant."""

    harmless = HARMLESS | {"signature"}

    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(JSONObject):
    """Tool call of the assistant."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] = {}


_Texts = Annotated[list[TextBlock], Field(fail_fast=True), BeforeValidator(wrap_text, str | list[TextBlock])]


class ToolResultBlock(JSONObject):
    """Result of a tool call; chat templates have no place for whether it is an error."""

    harmless = HARMLESS | {"is_error"}

    type: Literal["tool_result"]
    tool_use_id: str
    content: _Texts = []


def _block_type(block: object) -> object:
    return block.get("type") if isinstance(block, dict) else getattr(block, "type", None)


_Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(
        _block_type,
        custom_error_type="unsupported",
        custom_error_message="expected a block of type text, thinking, tool_use or tool_result; only text is supported",
    ),
]


class InputMessage(JSONObject):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[_Block], Field(fail_fast=True), BeforeValidator(wrap_text, str | list[_Block])]


_SERVER_TOOL = "only tools with an input_schema are supported, none that a server runs"


class Tool(JSONObject):
    """Function that the model may call."""

    type: Annotated[Literal["custom"], reject(_SERVER_TOOL, "custom")] = "custom"
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any] = {}
    strict: bool = False


class ToolChoice(JSONObject):
    """Which tools the model may or has to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str = Field(default="", description="Of the tool, for type tool.")
    disable_parallel_tool_use: bool = False


class _Thinking(JSONObject):
    type: Literal["enabled", "adaptive", "disabled"]


class _OutputFormat(JSONObject):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class _OutputConfig(JSONObject):
    effort: ReasoningEffort = ""
    format: _OutputFormat | None = None


class CountTokensRequest(SamplingFields):
    """Body of `POST /v1/messages/count_tokens`; sampling fields are accepted, and have no effect."""

    refused = {name: refusal for name, refusal in REFUSED_PARAMETERS.items() if name != "stop_sequences"} | {
        **REFUSED_MESSAGES
    }

    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
    system: _Texts = []
    tools: Annotated[list[Tool], Field(fail_fast=True)] = []
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: _Thinking | None = None
    output_config: _OutputConfig = _OutputConfig()
    output_format: _OutputFormat | None = None
    chat_template_kwargs: dict[str, Any] = {}


class MessagesRequest(CountTokensRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: MaxTokens = Field(description=MAX_TOKENS)
    stop_sequences: Stop = []
    stream: bool = False
