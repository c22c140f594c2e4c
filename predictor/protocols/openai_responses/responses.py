"""Response objects of the Responses API."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from predictor.protocols.best_of import best
from predictor.protocols.openai_responses.items import FunctionCall, Item, Message, Reasoning, text_tokens, tokens_from
from predictor.protocols.openai_responses.requests import DecodedRequest
from predictor.types import Completion, CompletionDelta, FinishReason


def encode(decoded: DecodedRequest, completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the whole response, which has the best of the completions and the usage of all."""
    [completion] = best(completions, n=1, candidates=decoded.request.n)
    completion = replace(
        completion,
        completion_tokens=sum(candidate.completion_tokens for candidate in completions),
        reasoning_tokens=sum(candidate.reasoning_tokens for candidate in completions),
    )
    is_cut = completion.finish_reason is FinishReason.LENGTH
    items: list[Item] = []
    if completion.reasoning:
        items.append(Reasoning(completion.reasoning))
    if completion.text or not (completion.tool_calls or is_cut):
        tokens = text_tokens(completion.tokens) if decoded.logprobs else []
        items.append(Message(completion.text, [*tokens_from(tokens, completion.text, len(completion.reasoning))]))
    items += [FunctionCall(call.id, call.name, call.arguments) for call in completion.tool_calls]
    output = [item.to_json("completed") for item in items]
    if is_cut and output:
        output[-1] = items[-1].to_json("incomplete")
    return ended(decoded, output, completion)


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
