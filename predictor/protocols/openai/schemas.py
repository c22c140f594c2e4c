"""OpenAI's request bodies as pydantic models: types and limits of the supported fields.

`field_tables` has the fields that have no effect or are refused. vLLM's extra sampling fields are supported.
"""

from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from predictor.errors import InvalidRequest
from predictor.protocols.field_tables import REFUSED_CHAT, REFUSED_COMPLETION, REFUSED_MESSAGE
from predictor.protocols.field_validators import (
    Prompt,
    ReasoningEffort,
    one_issue,
    reasoning_fields,
    reject,
    wrap_prompt,
    wrap_text,
)
from predictor.protocols.json_body import loads
from predictor.protocols.json_object import JSONObject
from predictor.protocols.openai.tool_fields import ToolFields
from predictor.protocols.sampling_fields import (
    MAX_COMPLETIONS,
    MAX_LOGPROBS,
    MAX_TOKENS,
    MaxTokens,
    PromptLogprobs,
    SamplingFields,
    Stop,
)

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of max_tokens for completions; for chats it is the model's."""


class _TextPart(JSONObject):
    type: Annotated[Literal["text"], reject("only text parts are supported, not images, audio or files", "text")]
    text: str


def _refusal_to_text(part: object) -> object:
    """Return a part in which the assistant refused, which clients send back with the conversation, as a text part."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {**part, "type": "text", "text": part.get("refusal")}
    return part


_Part = Annotated[_TextPart, BeforeValidator(_refusal_to_text, _TextPart)]


def _parse_arguments(arguments: object) -> object:
    """Return the arguments of a call as an object, which chat templates need.

    Models generate calls without arguments, or cut off by max_tokens; clients then send these with every request.
    """
    if isinstance(arguments, str):
        with suppress(InvalidRequest):
            arguments = loads(arguments.encode())
    return arguments if isinstance(arguments, dict) else {}


CallArguments = Annotated[
    dict[str, Any],
    BeforeValidator(_parse_arguments, Any),
    Field(description="An object, also as JSON in a string; anything else is read as {}."),
]


class _FunctionCall(JSONObject):
    name: str
    arguments: CallArguments = {}


class _ToolCall(JSONObject):
    id: str
    type: Annotated[Literal["function"], reject("only function calls are supported", "function")]
    function: _FunctionCall


class Message(JSONObject):
    """A message of a chat."""

    refused = REFUSED_MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    """`function` is deprecated: `tool`."""
    content: Annotated[list[_Part], Field(fail_fast=True), BeforeValidator(wrap_text, str | list[_TextPart])] = []
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[_ToolCall], Field(fail_fast=True)] = []
    function_call: _FunctionCall | None = Field(default=None, description="Deprecated: tool_calls.")
    reasoning_content: str | None = None
    """Not in the API; read by chat templates of reasoning models."""
    reasoning: str | None = None
    """Another name of `reasoning_content`."""
    prefix: bool = False
    """Not in OpenAI's API: continue this message, the last one, as `continue_final_message` does."""

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        assistant = self.role == "assistant"
        # Clients send back answers without text: of assistants that call tools or answer nothing, and of tools.
        if self.role not in ("assistant", "tool", "function") and "content" not in self.model_fields_set:
            raise PydanticCustomError("content", "content is required")
        if not assistant and (self.tool_calls or self.function_call or self.reasoning_content or self.reasoning):
            raise PydanticCustomError(
                "role", "tool_calls, function_call, reasoning_content and reasoning are allowed for role assistant only"
            )
        if (self.role == "tool") is (self.tool_call_id is None):
            raise PydanticCustomError("role", "tool_call_id is required for role tool, and allowed for no other")
        if self.role == "function" and not self.name:
            raise PydanticCustomError("role", "name is required for role function")
        return self

    def to_template_message(self) -> dict[str, Any]:
        """Return the message for the chat template, its text parts concatenated."""
        fields = self.model_dump(exclude_unset=True, exclude={"prefix", "function_call", "reasoning"})
        fields["content"] = "".join(part.text for part in self.content)
        if reasoning := self.reasoning_content or self.reasoning:
            fields |= reasoning_fields(reasoning)
        return fields


class _StreamOptions(JSONObject):
    include_usage: bool = False


class BaseRequest(SamplingFields):
    """Fields common to completions and chat completions."""

    model: str
    n: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy.")
    stop: Stop = []
    prompt_logprobs: PromptLogprobs | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None


class CompletionRequest(BaseRequest):
    """Body of `POST /v1/completions`."""

    refused = {**BaseRequest.refused, **REFUSED_COMPLETION}

    prompt: Annotated[
        list[Prompt],
        Field(min_length=1, fail_fast=True),
        one_issue(
            "expected a string, a list of strings, of token ids or of lists of token ids, none of them empty",
            list[Prompt],
        ),
        BeforeValidator(wrap_prompt, Prompt | list[Prompt]),
    ]
    max_tokens: MaxTokens | None = Field(default=DEFAULT_MAX_TOKENS, description=MAX_TOKENS)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


class ChatCompletionRequest(BaseRequest, ToolFields):
    """Body of `POST /v1/chat/completions`."""

    refused = {**BaseRequest.refused, **REFUSED_CHAT}

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: MaxTokens | None = Field(default=None, description=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the model's chat template, such as `enable_thinking`."""
    reasoning_effort: ReasoningEffort = ""
    """For chat templates with such a variable. `none` turns the reasoning off."""
    continue_final_message: bool = False
    """Continue the last message, which is the assistant's, instead of beginning a new one."""
    add_generation_prompt: bool = True
    """Begin the assistant's message."""
    service_tier: Any = None
    """Reported in the response as `default`."""
