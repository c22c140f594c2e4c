"""OpenAI's whole responses and errors, and the objects that they share with chunks of streams."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from predictor import errors
from predictor.errors import InvalidRequest, RequestError
from predictor.protocols.openai.requests import DecodedRequest
from predictor.types import UNFINISHED_CHARACTER, Completion, CompletionDelta, FinishReason, Token

_FINISH_REASONS = {
    None: None,
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
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
    errors.RateLimited: "rate_limit_exceeded",
}
"""Codes that clients handle; other errors have none."""


def encode(decoded: DecodedRequest, completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the whole response.

    Args:
        decoded: the request.
        completions: `n` of the first prompt, then of the next.
    """
    choices = []
    for index, completion in enumerate(completions):
        output = {"message": _message(completion)} if decoded.is_chat else {"text": completion.text}
        choices.append(choice(decoded, completion, output, index=index))
    return {
        **response_head(decoded, "chat.completion"),
        "choices": choices,
        "usage": usage(
            (completion.prompt_tokens for completion in completions[:: decoded.n]),
            (completion.completion_tokens for completion in completions),
            (completion.reasoning_tokens for completion in completions),
        ),
    }


def _message(completion: Completion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    if completion.reasoning:
        message |= reasoning_fields(completion.reasoning)
    if completion.tool_calls:
        message["content"] = completion.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in completion.tool_calls
        ]
    return message


def reasoning_fields(text: str) -> dict[str, str]:
    """Return the fields with the reasoning, which is not in OpenAI's API: some clients read one, some the other."""
    return {"reasoning_content": text, "reasoning": text}


def encode_error(error: RequestError) -> dict[str, Any]:
    """Return OpenAI's error object; that of `DeadlineExceeded` has `partial`, the text of its completions so far."""
    content: dict[str, Any] = {
        "message": str(error),
        "type": _ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error"),
        "param": error.field if isinstance(error, InvalidRequest) else None,
        "code": _ERROR_CODES.get(type(error)),
    }
    if isinstance(error, errors.DeadlineExceeded) and error.partial:
        content["partial"] = list(error.partial)
    return {"error": content}


def response_head(decoded: DecodedRequest, chat_object: str) -> dict[str, Any]:
    """Return the fields before `choices`; `chat_object` is the object type of a chat's response."""
    object_type = chat_object if decoded.is_chat else "text_completion"
    head = {"id": decoded.id, "object": object_type, "created": decoded.created, "model": decoded.model}
    return {**head, "service_tier": "default"} if decoded.include_service_tier else head


def usage(
    prompt_tokens: Iterable[int], completion_tokens: Iterable[int], reasoning_tokens: Iterable[int]
) -> dict[str, Any]:
    """Return the total token counts, from those of each prompt and of each completion."""
    prompt, completion, reasoning = sum(prompt_tokens), sum(completion_tokens), sum(reasoning_tokens)
    total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**total, "completion_tokens_details": {"reasoning_tokens": reasoning}} if reasoning else total


def choice(
    decoded: DecodedRequest,
    completion: Completion | CompletionDelta,
    output: dict[str, Any],
    *,
    index: int,
    text_offset: int = 0,
) -> dict[str, Any]:
    """Return one choice of a response or a chunk.

    Args:
        decoded: the request.
        completion: has the tokens and the finish reason.
        output: field with the text: `text`, `message` or `delta`.
        index: of the completion.
        text_offset: of the first token, in characters of all tokens since the beginning of the completion.
    """
    tokens = text_tokens(completion.tokens)
    logprobs = _chat_logprobs(tokens) if decoded.is_chat else _completion_logprobs(tokens, text_offset)
    return {
        "index": index,
        **output,
        "logprobs": logprobs if decoded.logprobs else None,
        "finish_reason": _FINISH_REASONS[completion.finish_reason],
    }


def text_tokens(tokens: Iterable[Token]) -> list[Token]:
    """Return all but special tokens, which OpenAI's API does not report."""
    return [token for token in tokens if not token.special]


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    content = [
        {**_token_logprob(token), "top_logprobs": [_token_logprob(alternative) for alternative in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token_logprob(token: Token) -> dict[str, Any]:
    octets = None if UNFINISHED_CHARACTER in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": token.logprob, "bytes": octets}


def _completion_logprobs(tokens: Sequence[Token], text_offset: int) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_logprobs(token) for token in tokens],
        "text_offset": list(accumulate((len(token.text) for token in tokens), initial=text_offset))[:-1],
    }


def _top_logprobs(token: Token) -> dict[str, float]:
    """Return log probabilities of the token and its alternatives by text; of equal texts the most probable."""
    ranked = sorted((token, *token.top), key=lambda alternative: alternative.logprob)
    return {alternative.text: alternative.logprob for alternative in ranked}
