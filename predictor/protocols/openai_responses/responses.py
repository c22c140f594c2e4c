"""Response objects of the Responses API."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from predictor.protocols.best_of import best
from predictor.protocols.openai_responses.items import FunctionCall, Item, Message, Reasoning, find, text_tokens
from predictor.protocols.openai_responses.requests import DecodedRequest
from predictor.types import (
    Completion,
    CompletionDelta,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    Token,
    ToolCallDelta,
)


def encode(decoded: DecodedRequest, completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the whole response, which has the best of the completions and the usage of all."""
    [completion] = best(completions, n=1, candidates=decoded.request.n)
    completion = replace(
        completion,
        completion_tokens=sum(candidate.completion_tokens for candidate in completions),
        reasoning_tokens=sum(candidate.reasoning_tokens for candidate in completions),
    )
    is_cut = completion.finish_reason is FinishReason.LENGTH
    items = _items(completion)
    if not (is_cut or any(isinstance(item, Message | FunctionCall) for item in items)):
        items.append(Message())
    if decoded.logprobs:
        _set_tokens(items, text_tokens(completion.tokens))
    output = [item.to_json("completed") for item in items]
    if is_cut and output:
        output[-1] = items[-1].to_json("incomplete")
    return ended(decoded, output, completion)


def _items(completion: Completion) -> list[Item]:
    items: list[Item] = []
    for delta in completion.deltas:
        match delta:
            case TextDelta(text):
                items.append(Message(text))
            case ReasoningDelta(text):
                items.append(Reasoning(text))
            case ToolCallDelta(_, arguments, id_, name):
                if id_ is not None and name is not None:
                    items.append(FunctionCall(id_, name))
                if isinstance(items[-1], FunctionCall):
                    items[-1].arguments += arguments
    return items


def _set_tokens(items: Iterable[Item], tokens: list[Token]) -> None:
    """Set the tokens of each message; `tokens` are those of all items and of markers."""
    skip = 0
    for item in items:
        if isinstance(item, Reasoning):
            skip += len(item.text)
        if isinstance(item, Message):
            start = find(tokens, item.text, skip)
            # Parts of a character are not found.
            tokens, skip = tokens[start or 0 :], 0
            lengths = accumulate((len(token.text) for token in tokens), initial=0)
            count = len(tokens) if start is None else sum(length < len(item.text) for length in lengths)
            item.tokens, tokens = tokens[:count], tokens[count:]


def ended(
    decoded: DecodedRequest, output: list[dict[str, Any]], completion: Completion | CompletionDelta
) -> dict[str, Any]:
    """Return the response object of a completion that has a finish reason."""
    is_cut = completion.finish_reason is FinishReason.LENGTH
    return response(
        decoded,
        "incomplete" if is_cut else "completed",
        output=output,
        incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
        usage=_usage(completion),
    )


def response(decoded: DecodedRequest, status: str, **fields: Any) -> dict[str, Any]:
    """Return a response object; `fields` are those that differ from the ones of a response without output."""
    empty: dict[str, Any] = {"output": [], "error": None, "incomplete_details": None, "usage": None}
    return {**decoded.head, "status": status, **empty, **fields}


def _usage(completion: Completion | CompletionDelta) -> dict[str, Any]:
    return {
        "input_tokens": completion.prompt_tokens,
        # Prefixes are shared in the KV cache, but not counted for each request.
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": completion.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": completion.reasoning_tokens},
        "total_tokens": completion.prompt_tokens + completion.completion_tokens,
    }
