"""Deltas for the encoders' tests."""

from predictor.types import CompletionDelta, FinishReason, TextDelta, Token


def delta(
    index: int,
    text: str,
    prompt_tokens: int,
    completion_tokens: int,
    finish_reason: FinishReason | None = None,
    tokens: tuple[Token, ...] = (),
) -> CompletionDelta:
    return CompletionDelta(
        index=index,
        deltas=(TextDelta(text),) if text else (),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        finish_reason=finish_reason,
        tokens=tokens,
    )
