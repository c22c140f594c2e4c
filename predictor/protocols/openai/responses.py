"""OpenAI's whole responses and errors, and the objects that they share with chunks of streams."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from predictor import errors
from predictor.errors import InvalidRequest, RequestError
from predictor.protocols.best_of import best
from predictor.protocols.field_validators import reasoning_fields
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
        completions: all candidates of the first prompt, then of the next.
    """
    choices = []
    for index, completion in enumerate(best(completions, n=decoded.n, candidates=decoded.candidates)):
        output = {"message": _message(decoded, completion)} if decoded.is_chat else {"text": completion.text}
        choices.append(choice(decoded, completion, output, index=index))
        if decoded.prompt_logprobs is not None and not decoded.is_chat:
            choices[-1]["prompt_logprobs"] = _prompt_logprobs(completion.prompt, decoded.prompt_logprobs)
    response = {**response_head(decoded, "chat.completion"), "choices": choices}
    if decoded.prompt_logprobs is not None and decoded.is_chat:
        response["prompt_logprobs"] = _prompt_logprobs(completions[0].prompt, decoded.prompt_logprobs)
    return {
        **response,
        "usage": usage(
            (completion.prompt_tokens for completion in completions[:: decoded.candidates]),
            (completion.completion_tokens for completion in completions),
            (completion.reasoning_tokens for completion in completions),
        ),
    }


def _message(decoded: DecodedRequest, completion: Completion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    if completion.reasoning:
        message |= reasoning_fields(completion.reasoning)
    calls = [{"name": call.name, "arguments": call.arguments} for call in completion.tool_calls]
    if calls:
        message["content"] = completion.text or None
    if calls and decoded.uses_functions:
        message["function_call"] = calls[0]
    elif calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": function}
            for call, function in zip(completion.tool_calls, calls, strict=True)
        ]
    return message


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
        text_offset: of the first token, in characters since the beginning of the text.
    """
    logprobs = None
    if decoded.logprobs is not None:
        tokens = reported_tokens(decoded, completion)
        if decoded.is_chat:
            logprobs = _chat_logprobs(tokens)
        else:
            logprobs = _completion_logprobs(tokens, decoded.logprobs, text_offsets(tokens, output["text"], text_offset))
    return {
        "index": index,
        **output,
        "logprobs": logprobs,
        "finish_reason": finish_reason(decoded, completion),
    }


def finish_reason(decoded: DecodedRequest, completion: Completion | CompletionDelta) -> str | None:
    """Return the finish reason in OpenAI's words; None while a stream goes on."""
    reason = _FINISH_REASONS[completion.finish_reason]
    return "function_call" if reason == "tool_calls" and decoded.uses_functions else reason


def reported_tokens(decoded: DecodedRequest, completion: Completion | CompletionDelta) -> list[Token]:
    """Return the tokens whose log probabilities are reported.

    With the prompt these are all tokens, so that clients which send token ids find theirs by position. Else they are
    all but special tokens, which OpenAI's API does not report.
    """
    if decoded.echo:
        return [*completion.prompt, *completion.tokens]
    return [token for token in completion.tokens if not token.special]


def text_offsets(tokens: Iterable[Token], text: str, offset: int) -> list[int]:
    """Return the offsets of the tokens, in characters, and that of what follows.

    Args:
        tokens: in order.
        text: contains those special tokens that are part of a prompt's text, which begins at offset 0.
        offset: of the first token.
    """
    offsets = [offset]
    for token in tokens:
        is_text = not token.special or text.startswith(token.text, offsets[-1])
        offsets.append(offsets[-1] + (len(token.text) if is_text else 0))
    return offsets


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    content = [
        {**_token_logprob(token), "top_logprobs": [_token_logprob(alternative) for alternative in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token_logprob(token: Token) -> dict[str, Any]:
    octets = None if UNFINISHED_CHARACTER in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": token.logprob, "bytes": octets}


def _completion_logprobs(tokens: Sequence[Token], top: int, offsets: Sequence[int]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_logprobs(token, top) for token in tokens],
        "text_offset": offsets[:-1],
    }


def _top_logprobs(token: Token, top: int) -> dict[str, float | None] | None:
    """Return log probabilities of the token and its alternatives by text; of equal texts the most probable."""
    if token.logprob is None:
        return None
    ranked = sorted((token, *token.top[:top]), key=lambda alternative: alternative.logprob or 0.0)
    return {alternative.text: alternative.logprob for alternative in ranked}


def _prompt_logprobs(tokens: Sequence[Token], top: int) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: by token id, the prompt's token and the most probable ones."""
    return [
        None
        if token.logprob is None
        else {
            str(alternative.id): {
                "logprob": alternative.logprob,
                "rank": alternative.rank,
                "decoded_token": alternative.text,
            }
            for alternative in (token, *token.top[:top])
        }
        for token in tokens
    ]
