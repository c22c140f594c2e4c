"""Render chats with the model's chat template.

The template is a Jinja program that comes with the weights. It runs with a time limit, and is tested at the start:
whether it works at all, which roles it renders, and whether it reads contents as strings or as lists of parts.
"""

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from predictor.errors import ChatTemplateFailed, InvalidRequest, InvalidSettings
from predictor.generation import template_analysis
from predictor.generation.control_tokens import ControlTokens
from predictor.generation.time_limit import TimeLimitExceeded, time_limit
from predictor.generation.tokenizer import ChatTokenizer
from predictor.types import Chat, Message

logger = logging.getLogger(__name__)

RENDER_SECONDS = 3.0
"""A template that runs longer is cut off. Thousands of messages take less than one second."""
OK, MISSING = "ok", "missing"

_BYTE_ORDER_MARK = "\ufeff"
_MAX_REASON = 300
_PROBE = "probe0text"
_CALL = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": {_PROBE: 1}}}
_REASONING_FIELDS = frozenset({"reasoning_content", "reasoning", "thinking"})
_ROLE = re.compile(r"[\w-]{1,64}")
MAX_OTHER_ROLES = 16
"""Maximum number of different roles in a chat besides those of OpenAI; for each, the template runs twice."""


class _Content(StrEnum):
    """How a template treats the content of messages of one role."""

    STRING = "string"
    PARTS = "parts"
    DROPPED = "dropped"
    REJECTED = "rejected"


class _Unusable(Exception):
    """The template cannot work, whatever the messages are."""


class ChatTemplate:
    """The model's chat template.

    Args:
        tokenizer: the model's, with its chat template.
        variables: of the template, for chats that do not set them.

    Raises:
        InvalidSettings: `variables` contains a name that cannot be set.
    """

    def __init__(self, tokenizer: ChatTokenizer, variables: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        # `documents` is a parameter of transformers only for its type; templates treat it like any variable.
        self._reserved = {"self", "messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {
            "documents"
        }
        if reserved := self._reserved & self._variables.keys():
            raise InvalidSettings(f"--chat_template_kwargs cannot set {', '.join(sorted(reserved))}. Remove it.")
        self._control_tokens = ControlTokens(tokenizer)
        self._names: frozenset[str] = frozenset()
        self._contents: dict[str, _Content] = {}
        self._later_contents: dict[str, _Content] = {}
        """Of instructions after the first message, which some templates reject or leave out."""
        self._writes_arguments = False
        """The template writes the arguments of tool calls as they are, so that they must be JSON already."""
        self._keeps_reasoning = True
        """The template accepts reasoning in messages with text and tool calls."""
        self.status = OK if tokenizer.chat_template else MISSING
        """OK, MISSING, or the reason why the template cannot work."""
        if self.status == OK:
            self._test()

    def render(self, chat: Chat) -> str:
        """Return the chat as text, with control tokens in its messages broken by `control_tokens.BREAK`.

        Raises:
            InvalidRequest: the model has no template, or the template rejects the messages or their variables.
            ChatTemplateFailed: the template does not work, or exceeds the time limit.
        """
        if self.status == MISSING:
            raise InvalidRequest("This model has no chat template. Send the prompt as text instead of messages.")
        if self.status != OK:
            raise _failed(self.status)
        if reserved := self._reserved & chat.variables.keys():
            names = ", ".join(sorted(reserved))
            raise InvalidRequest(f"chat_template_kwargs cannot set {names}. Omit it.", "chat_template_kwargs")
        if chat.continue_final_message and chat.messages[-1]["role"] != "assistant":
            raise InvalidRequest("Only a last message with role assistant can be continued.", "messages")
        try:
            return self._render(
                list(self._convert(chat.messages)),
                tools=list(chat.tools),
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                variables={**self._variables, **self._reasoning_variables(chat.reasoning_effort), **chat.variables},
            )
        except InvalidRequest:
            raise
        except _Unusable as error:
            raise _failed(str(error)) from error
        # A program that works for plain chats may raise anything for unusual messages.
        except Exception as error:
            given = " or chat_template_kwargs" if chat.variables else ""
            raise InvalidRequest(
                f"The model's chat template rejected the messages{given}: {_reason(error)}."
            ) from error

    def ignored_fields(self, chat: Chat) -> list[str]:
        """Return the names of OpenAI's fields in `chat` that set nothing in this template."""
        fields = [f"chat_template_kwargs.{name}" for name in chat.variables if name not in self._names]
        if chat.reasoning_effort and not self._reasoning_variables(chat.reasoning_effort):
            fields.append("reasoning_effort")
        return fields

    def _render(
        self,
        messages: list[Any],
        *,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        escape = self._control_tokens.escape
        source = self._source(tools)
        try:
            with time_limit(RENDER_SECONDS):
                return self._tokenizer.apply_chat_template(
                    escape(messages),
                    tools=escape(tools) or None,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **escape(self._variables if variables is None else variables),
                )
        except TimeLimitExceeded:
            raise _Unusable(f"it does not end within {RENDER_SECONDS:g} s") from None
        except (RecursionError, MemoryError) as error:
            raise _Unusable(_reason(error)) from error

    def _source(self, tools: list[Any] | None) -> str:
        """Return the template: of several, the one named tool_use if there are tools, else the one named default."""
        return self._tokenizer.get_chat_template(None, tools or None).removeprefix(_BYTE_ORDER_MARK)

    def _convert(self, messages: tuple[Message, ...]) -> Iterator[dict[str, Any]]:
        """Yield the messages with the roles and the kind of contents that the template reads.

        `developer` becomes `system`, and `system` the beginning of the next user message, if the template has no such
        role, or not at that place.
        """
        instructions: list[str] = []
        first = self._contents | self._probe_others({message["role"] for message in messages})
        later = first | self._later_contents
        for position, message in enumerate(messages):
            role, content = message["role"], message["content"]
            kinds = later if position else first
            kind = kinds[role]
            if role == "developer" and kind in (_Content.DROPPED, _Content.REJECTED):
                role, kind = "system", kinds["system"]
            if role == "system" and kind in (_Content.DROPPED, _Content.REJECTED):
                instructions.append(content)
                continue
            if kind is _Content.DROPPED and role not in ("user", "assistant"):
                raise InvalidRequest(
                    f"The model's chat template leaves out messages with role {role}. Use role user.", "messages"
                )
            if role == "user" and instructions:
                content = "\n\n".join([*instructions, content])
                instructions = []
            yield self._convert_calls({**message, "role": role, "content": _as(kind, content)})
        if instructions:
            yield {"role": "user", "content": _as(self._contents["user"], "\n\n".join(instructions))}

    def _convert_calls(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with its tool calls and its reasoning as the template reads them.

        Some templates take an empty list for calls, and leave out the content; others reject reasoning next to both.
        """
        calls = message.get("tool_calls")
        left_out = set() if calls else {"tool_calls"}
        if calls and message["content"] and not self._keeps_reasoning:
            left_out |= _REASONING_FIELDS
        message = {name: value for name, value in message.items() if name not in left_out}
        return _with_text_arguments(message) if calls and self._writes_arguments else message

    def _probe_others(self, roles: set[str]) -> dict[str, _Content]:
        """Probe the roles that are not known from the start.

        They are names that clients choose, so none is remembered.
        """
        others = roles - self._contents.keys()
        for role in others:
            if not _ROLE.fullmatch(role):
                raise InvalidRequest(f"Invalid role: {role[:80]!r}. Use system, user, assistant or tool.", "messages")
        if len(others) > MAX_OTHER_ROLES:
            raise InvalidRequest(
                f"Too many roles: {len(others)} besides system, user, assistant and tool. Use at most "
                f"{MAX_OTHER_ROLES}.",
                "messages",
            )
        return {role: self._probe(role) for role in others}

    def _reasoning_variables(self, effort: str | None) -> dict[str, Any]:
        """Return values for those of the usual variables for reasoning that this template reads."""
        if effort is None:
            return {}
        thinking = effort != "none"
        usual = {"reasoning_effort": effort, "enable_thinking": thinking, "thinking": thinking}
        return {name: value for name, value in usual.items() if name in self._names}

    def _test(self) -> None:
        """Set `status`, and find what the template reads."""
        try:
            analysis = template_analysis.analyse({self._source(None), self._source([{}])})
            self._names = analysis.variables
            self._control_tokens = ControlTokens(self._tokenizer, analysis.written, analysis.read)
            for role in ("user", "system", "developer", "assistant"):
                self._contents[role] = self._probe(role)
            self._probe_calls()
            self._contents["tool"] = self._probe("tool")
            for role in ("system", "developer"):
                self._later_contents[role] = self._probe(role, later=True)
            if self._contents["user"] is self._contents["system"] is _Content.REJECTED:
                self._render([{"role": "user", "content": _PROBE}])
        # Any error means the same here: the template is unusable.
        except Exception as error:  # noqa: BLE001
            self.status = _reason(error)
        if self.status != OK:
            logger.warning("chat requests will fail, since the chat template does not work: %s", self.status)

    def _probe_calls(self) -> None:
        """Find how the template takes the arguments of tool calls, and reasoning next to text and calls."""
        user = {"role": "user", "content": _as(self._contents["user"], "Hi")}
        call = {"role": "assistant", "content": _as(self._contents["assistant"], ""), "tool_calls": [_CALL]}
        if self._rejects([user, call]) or f"{{'{_PROBE}'" in self._render([user, call]):
            self._writes_arguments = not self._rejects([user, _with_text_arguments(call)])
        full = {**call, "content": _as(self._contents["assistant"], "Ho"), "reasoning_content": "Hm"}
        self._keeps_reasoning = not self._rejects([user, self._convert_calls(full)])

    def _rejects(self, messages: list[dict[str, Any]]) -> bool:
        try:
            self._render(messages)
        except _Unusable:
            raise
        # See `render`.
        except Exception:  # noqa: BLE001
            return True
        return False

    def _probe(self, role: str, *, later: bool = False) -> _Content:
        """Render a message of this role in a usual chat, first with a string, then with parts.

        Instructions are the first message, or a `later` one.
        """
        kind = _Content.REJECTED
        for candidate in (_Content.STRING, _Content.PARTS):
            try:
                text = self._render(self._probe_messages(role, candidate, later=later))
            except _Unusable:
                raise
            # See `render`.
            except Exception:  # noqa: BLE001, S112
                continue
            if _PROBE in text:
                return candidate
            kind = _Content.DROPPED
        return kind

    def _probe_messages(self, role: str, kind: _Content, *, later: bool) -> list[dict[str, Any]]:
        user = {"role": "user", "content": _as(self._contents.get("user", _Content.STRING), "Hi")}
        message = {"role": role, "content": _as(kind, _PROBE)}
        if role == "user":
            return [message]
        if role == "assistant":
            return [user, message, user]
        if role == "tool":
            call = {"role": "assistant", "content": _as(self._contents["assistant"], ""), "tool_calls": [_CALL]}
            return [user, self._convert_calls(call), {**message, "tool_call_id": _CALL["id"]}]
        if later:
            return [user, {"role": "assistant", "content": _as(self._contents["assistant"], "Hi")}, message, user]
        return [message, user]


def _failed(reason: str) -> ChatTemplateFailed:
    return ChatTemplateFailed(
        f"The model's chat template does not work: {reason}. Correct it in the model's directory. Completions work."
    )


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose tool calls have JSON instead of objects as arguments."""
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}


def _as(kind: _Content, text: str) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": text}] if kind is _Content.PARTS else text


def _reason(error: BaseException) -> str:
    """Return an error of a template in one short line; Jinja's have none or a long text at times."""
    text = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + " ..."
