"""Request fields of OpenAI's chats that offer tools: `tools`, `tool_choice`, and the deprecated `functions`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from predictor.errors import InvalidRequest
from predictor.protocols.field_validators import one_issue, reject
from predictor.protocols.json_object import JSONObject


class FunctionDefinition(JSONObject):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of the arguments.")
    strict: bool = Field(default=False, description="The arguments of all calls follow the schema.")


class Tool(JSONObject):
    """A tool that the model may use."""

    type: Annotated[Literal["function"], reject("only function tools are supported", "function")]
    function: FunctionDefinition


class FunctionName(JSONObject):
    """Reference to a function by its name."""

    name: str


class _NamedTool(JSONObject):
    type: Literal["function"]
    function: FunctionName


class _AllowedTools(JSONObject):
    mode: Literal["auto", "required"]
    tools: Annotated[list[_NamedTool], Field(min_length=1)]


class _AllowedToolChoice(JSONObject):
    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools


_ToolChoice = Literal["none", "auto", "required"] | _NamedTool | _AllowedToolChoice
_FunctionChoice = Literal["none", "auto"] | FunctionName


class ToolFields(JSONObject):
    """The tools of a chat, and whether the model may or has to call them."""

    tools: Annotated[list[Tool], Field(fail_fast=True)] = []
    tool_choice: Annotated[
        _ToolChoice,
        one_issue(
            'expected "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}',
            _ToolChoice,
        ),
    ] = "auto"
    parallel_tool_calls: bool = True
    functions: Annotated[list[FunctionDefinition], Field(fail_fast=True, description="Deprecated: tools.")] = []
    function_call: Annotated[
        _FunctionChoice | None, one_issue('expected "none", "auto" or {"name": ...}', _FunctionChoice)
    ] = Field(default=None, description="Deprecated: tool_choice.")

    def chat_fields(self) -> dict[str, Any]:
        """Return the arguments of `Chat` that describe tools.

        Raises:
            InvalidRequest: the choice names a tool that does not exist, or requires a call without any tool.
        """
        tools, required = self._offered_functions() if self.functions else self._offered_tools()
        # OpenAI's API calls a function that the choice names exactly once.
        single = bool(self.functions) or isinstance(self.tool_choice, _NamedTool)
        return {
            "tools": tuple(tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in tools),
            "strict_tools": frozenset(tool.function.name for tool in tools if tool.function.strict),
            "requires_tool_call": required,
            "parallel_tool_calls": self.parallel_tool_calls and not single,
        }

    def _offered_tools(self) -> tuple[list[Tool], bool]:
        """Return the tools that the model may call, and whether it has to call one."""
        if isinstance(self.function_call, FunctionName):
            raise _without_tools("function_call", "functions")
        choice = self.tool_choice
        if isinstance(choice, _NamedTool):
            return _selected(self.tools, [choice.function.name], "tool_choice"), True
        if isinstance(choice, _AllowedToolChoice):
            names = [tool.function.name for tool in choice.allowed_tools.tools]
            return _selected(self.tools, names, "tool_choice"), choice.allowed_tools.mode == "required"
        if choice == "required" and not self.tools:
            raise _without_tools("tool_choice", "tools")
        return ([] if choice == "none" else self.tools), choice == "required"

    def _offered_functions(self) -> tuple[list[Tool], bool]:
        """Return the deprecated functions in the same way."""
        if self.tools:
            raise InvalidRequest("functions: replaced by tools. Omit it, since there are tools.", "functions")
        tools = [Tool(type="function", function=function) for function in self.functions]
        if isinstance(self.function_call, FunctionName):
            return _selected(tools, [self.function_call.name], "function_call"), True
        return ([] if self.function_call == "none" else tools), False


def _selected(tools: Sequence[Tool], names: Sequence[str], field: str) -> list[Tool]:
    if not tools:
        raise _without_tools(field, "tools")
    offered = [tool.function.name for tool in tools]
    if unknown := [name for name in names if name not in offered]:
        raise InvalidRequest(
            f"{field}: unknown tool {unknown[0]!r}. Use one of the request's: {', '.join(offered)}.", field
        )
    return [tool for tool in tools if tool.function.name in names]


def _without_tools(field: str, missing: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: there are no {missing}. Send {missing}, or omit it.", field)
