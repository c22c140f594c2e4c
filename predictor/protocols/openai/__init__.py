"""OpenAI's completions and chat completions: JSON bodies <-> generation requests, completions and pieces of streams.

What a body may say stands in `bodies.py`. Answers are plain dicts: importing the `openai` package would cost the
server's start more than it would give. Knows nothing of HTTP, tokenizers or the engine.
Specification: https://platform.openai.com/docs/api-reference.
"""

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

from pydantic import ValidationError

from predictor import errors
from predictor.errors import InvalidRequest, NotFound, RequestError
from predictor.protocols.json_body import schema, sentence
from predictor.protocols.openai.schemas import Body, Chats, Completions
from predictor.types import (
    UNFINISHED_CHARACTER,
    Chat,
    Completion,
    CompletionDelta,
    FinishReason,
    GenerationRequest,
    Token,
)

OWNER = "kserve-llm"
COMPLETIONS_SCHEMA = schema(Completions)
CHAT_SCHEMA = schema(Chats)

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
    content = _validate(Completions, body, model_name)
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
    content = _validate(Chats, body, model_name)
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


_BodyType = TypeVar("_BodyType", bound=Body)


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


def _asked(content: Completions | Chats, requests: list[GenerationRequest]) -> Asked:
    chat = isinstance(content, Chats)
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

    def piece(self, piece: CompletionDelta) -> list[str]:
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
    asked: Asked, index: int, said: Completion | CompletionDelta, of_chat: dict[str, Any], offset: int = 0
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
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens],
        "text_offset": list(accumulate((len(token.text) for token in tokens), initial=offset))[:-1],
    }


def _by_text(token: Token) -> dict[str, float]:
    """The rivals and the token itself; where several have the same text, the most probable of them."""
    ranked = sorted((token, *token.top), key=lambda rival: rival.logprob)
    return {rival.text: rival.logprob for rival in ranked}


def _with_bytes(token: Token) -> dict[str, Any]:
    whole = UNFINISHED_CHARACTER not in token.text
    octets = list(token.text.encode()) if whole else None
    return {"token": token.text, "logprob": token.logprob, "bytes": octets}
