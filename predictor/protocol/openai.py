"""OpenAI's completions and chat completions: JSON bodies <-> generation requests, completions and pieces of streams.

Every field of the API is served with its meaning or refused by name, and null means absent. Labels, which have no
influence on what is generated, are taken as they are: user, metadata, safety_identifier, all of prompt_cache_*, and
parallel_tool_calls, since tool calls come as text and are never split. vLLM's extra sampling fields are served, too.

Answers are plain dicts: importing the `openai` package would cost the server's start more than it would give.
Knows nothing of HTTP, tokenizers or the engine. Specification: https://platform.openai.com/docs/api-reference.
"""

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Annotated, Any, Literal, Self, TypeVar

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

from predictor import errors
from predictor.errors import InvalidRequest, NotFound, RequestError
from predictor.fields import MAX_COMPLETIONS, MAX_LOGPROBS, MAX_STOPS, Sampling, schema, sentence
from predictor.generation import Chat, Completion, FinishReason, GenerationRequest, Piece, Token

COMPLETION_TOKENS = 16
"""The API's default for max_tokens of completions; a chat's is the model's own."""
UNLIKELY = -9999.0
"""What the API gives for a log probability too low to tell; JSON knows no infinity."""
UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""Stands in a token's text for bytes that are no character without the next token."""
OWNER = "kserve-llm"

_FINISH_REASONS = {
    None: None,
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.LENGTH: "length",
}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout",
}
_ERROR_CODES: Mapping[type[RequestError], str] = {
    errors.PromptTooLong: "context_length_exceeded",
    errors.Unauthorized: "invalid_api_key",
    errors.Overloaded: "rate_limit_exceeded",
}
"""Codes that clients know to act upon; other errors have none."""


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


class _Body(_Object, Sampling):
    """What completions and chats have in common."""

    model: str
    n: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy.")
    stop: Annotated[list[_Text], Field(max_length=MAX_STOPS), BeforeValidator(_stops, _Text | list[_Text])] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0), _refuse("not served; leave it out", {})] = {}
    user: str | None = None


class _Completions(_Body):
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


class _Chats(_Body):
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


COMPLETIONS_SCHEMA = schema(_Completions)
CHAT_SCHEMA = schema(_Chats)


@dataclass(frozen=True, slots=True)
class Asked:
    """A decoded body: what to generate, and how to answer."""

    requests: list[GenerationRequest]
    """One for each prompt, in order; a chat is one."""
    n: int
    """Completions of each."""
    stream: bool
    id: str
    created: int
    """Unix time in seconds."""
    model: str
    chat: bool
    logprobs: bool
    include_usage: bool
    """Whether a stream tells its usage; whole answers always do."""
    service_tier: bool
    """Whether the answer tells the tier that served it, of which there is one."""


def models(name: str, created: int, context_tokens: int | None) -> dict[str, Any]:
    """The list of the one model; arguments as for `model`."""
    return {"object": "list", "data": [model(name, created, context_tokens)]}


def model(name: str, created: int, context_tokens: int | None) -> dict[str, Any]:
    """The model served.

    Args:
        name: as requests have it.
        created: Unix time in seconds.
        context_tokens: prompt and completion together at most, if known; told as `max_model_len`, which is vLLM's.
    """
    described = {"id": name, "object": "model", "created": created, "owned_by": OWNER}
    return described if context_tokens is None else {**described, "max_model_len": context_tokens}


def decode_completions(body: bytes, model_name: str) -> Asked:
    """What a body of completions asks for: one generation request for each prompt.

    Raises:
        InvalidRequest: not JSON, or a field that is missing, wrong or not served; the message names it.
        NotFound: a model that is not `model_name`.
    """
    content = _validate(_Completions, body, model_name)
    if content.best_of not in (None, content.n):
        raise _invalid("best_of", "no more than n are generated; leave it out")
    if content.echo and content.logprobs is not None:
        raise _invalid("echo", "log probabilities of prompts are not computed; leave out echo or logprobs")
    sampling = content.sampling(content.logprobs)
    prompts = [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in content.prompt]
    return _asked(content, [GenerationRequest(prompt, sampling, content.n, content.echo) for prompt in prompts])


def decode_chat(body: bytes, model_name: str) -> Asked:
    """What a body of chat completions asks for: one generation request.

    Raises:
        InvalidRequest: not JSON, or a field that is missing, wrong or not served; the message names it.
        NotFound: a model that is not `model_name`.
    """
    content = _validate(_Chats, body, model_name)
    if content.max_completion_tokens and content.max_tokens not in (None, content.max_completion_tokens):
        raise _invalid("max_tokens", "differs from max_completion_tokens, which replaces it; leave it out")
    if content.top_logprobs is not None and not content.logprobs:
        raise _invalid("top_logprobs", "needs logprobs to be true")
    sampling = content.sampling((content.top_logprobs or 0) if content.logprobs else None)
    sampling = replace(sampling, max_tokens=content.max_completion_tokens or content.max_tokens)
    messages = tuple(message.for_template() for message in content.messages)
    tools = () if content.tool_choice == "none" else content.tools
    chat = Chat(messages, tuple(tool.model_dump(exclude_unset=True) for tool in tools))
    return _asked(content, [GenerationRequest(chat, sampling, content.n)])


_BodyType = TypeVar("_BodyType", bound=_Body)


def _validate(body_type: type[_BodyType], body: bytes, model_name: str) -> _BodyType:
    try:
        content = body_type.model_validate_json(body)
    except ValidationError as error:
        fields = [".".join(map(str, issue["loc"])) for issue in error.errors(include_input=False)]
        field = fields[0] if len(fields) == 1 and fields[0] else None
        raise InvalidRequest(sentence(error, known=body_type.model_fields), field) from None
    if content.model != model_name:
        raise NotFound(f"model: the model served here is {model_name}, and no other.")
    if content.stream_options and not content.stream:
        raise _invalid("stream_options", "needs stream to be true")
    return content


def _invalid(field: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {why}.", field)


def _asked(content: _Completions | _Chats, requests: list[GenerationRequest]) -> Asked:
    chat = isinstance(content, _Chats)
    return Asked(
        requests=requests,
        n=content.n,
        stream=content.stream,
        id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=content.model,
        chat=chat,
        logprobs=requests[0].sampling.logprobs is not None,
        include_usage=content.stream_options is not None and content.stream_options.include_usage,
        service_tier="service_tier" in content.model_fields_set,
    )


def encode(asked: Asked, completions: Sequence[Completion]) -> dict[str, Any]:
    """The whole answer.

    Args:
        asked: what was decoded.
        completions: `n` of the first request, then of the next.
    """
    choices = []
    for index, completion in enumerate(completions):
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        choices.append(_choice(asked, index, completion, {"message": message}))
    prompt_tokens = (completion.prompt_tokens for completion in completions[:: asked.n])
    usage = _usage(prompt_tokens, (completion.completion_tokens for completion in completions))
    return {**_head(asked, "chat.completion"), "choices": choices, "usage": usage}


class Stream:
    """The server-sent events of one answer, each whole; after the end, or an error, there are no more."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._prompt_tokens: dict[int, int] = {}
        self._completion_tokens: dict[int, int] = {}
        self._offsets: defaultdict[int, int] = defaultdict(int)
        self._over = False

    def begin(self) -> list[str]:
        """What comes before anything is generated: who speaks, in each choice of a chat."""
        if not self._asked.chat:
            return []
        role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": index, **role}]) for index in range(self._asked.n)]

    def piece(self, piece: Piece) -> list[str]:
        """The event of one piece; none where it brings neither text nor tokens nor an end."""
        if self._over:
            return []
        self._prompt_tokens[piece.index // self._asked.n] = piece.prompt_tokens
        self._completion_tokens[piece.index] = piece.completion_tokens
        tokens = _spoken(piece.tokens) if self._asked.logprobs else []
        if not (piece.text or tokens or piece.finish_reason):
            return []
        delta = {"content": piece.text} if piece.text or tokens else {}
        offset = self._offsets[piece.index]
        self._offsets[piece.index] += sum(len(token.text) for token in tokens)
        return [self._chunk([_choice(self._asked, piece.index, piece, {"delta": delta}, offset)])]

    def end(self) -> list[str]:
        """The usage, if asked for, and the mark of the end."""
        if self._over:
            return []
        self._over = True
        usage = _usage(self._prompt_tokens.values(), self._completion_tokens.values())
        return [*([self._chunk([], usage)] if self._asked.include_usage else []), "data: [DONE]\n\n"]

    def error(self, error: RequestError) -> list[str]:
        """An error's object, which clients raise; it ends the stream in place of the mark."""
        if self._over:
            return []
        self._over = True
        return [_event(encode_error(error))]

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        chunk = {**_head(self._asked, "chat.completion.chunk"), "choices": choices}
        return _event({**chunk, "usage": usage} if self._asked.include_usage else chunk)


def encode_error(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object; one of a `DeadlineExceeded` also has `partial`, the texts of its completions so far."""
    described: dict[str, Any] = {
        "message": str(error),
        "type": _ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error"),
        "param": error.field if isinstance(error, InvalidRequest) else None,
        "code": _ERROR_CODES.get(type(error)),
    }
    if isinstance(error, errors.DeadlineExceeded) and error.partial:
        described["partial"] = list(error.partial)
    return {"error": described}


def _event(content: dict[str, Any]) -> str:
    # ASCII, since some clients take Unicode's line separators for the end of a line, too.
    return f"data: {json.dumps(content, allow_nan=False, separators=(',', ':'))}\n\n"


def _head(asked: Asked, chat_object: str) -> dict[str, Any]:
    kind = chat_object if asked.chat else "text_completion"
    head = {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}
    return {**head, "service_tier": "default"} if asked.service_tier else head


def _usage(prompt_tokens: Iterable[int], completion_tokens: Iterable[int]) -> dict[str, int]:
    """Token counts, given those of each prompt and of each completion."""
    prompt, completion = sum(prompt_tokens), sum(completion_tokens)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _choice(
    asked: Asked, index: int, said: Completion | Piece, of_chat: dict[str, Any], offset: int = 0
) -> dict[str, Any]:
    return {
        "index": index,
        **(of_chat if asked.chat else {"text": said.text}),
        "logprobs": _logprobs(asked.chat, _spoken(said.tokens), offset) if asked.logprobs else None,
        "finish_reason": _FINISH_REASONS[said.finish_reason],
    }


def _spoken(tokens: Iterable[Token]) -> list[Token]:
    """The tokens that a text is made of; the API does not tell the special ones, such as an end of sequence."""
    return [token for token in tokens if not token.special]


def _logprobs(chat: bool, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """Log probabilities in the form of either API.

    Args:
        chat: which of the two.
        tokens: of one completion, one after another.
        offset: of the first, in characters of all tokens from the beginning of the completion.
    """
    if chat:
        content = [
            {**_with_bytes(token), "top_logprobs": [_with_bytes(rival) for rival in token.top]} for token in tokens
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens],
        "text_offset": list(accumulate((len(token.text) for token in tokens), initial=offset))[:-1],
    }


def _by_text(token: Token) -> dict[str, float]:
    """The rivals and the token itself; where several have the same text, the most probable of them."""
    ranked = sorted((token, *token.top), key=lambda rival: rival.logprob)
    return {rival.text: _finite(rival.logprob) for rival in ranked}


def _with_bytes(token: Token) -> dict[str, Any]:
    whole = UNFINISHED_CHARACTER not in token.text
    octets = list(token.text.encode()) if whole else None
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": octets}


def _finite(logprob: float) -> float:
    return max(UNLIKELY, logprob)
