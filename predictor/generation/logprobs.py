"""Log probabilities of token ids, formatted as tokens with text."""

import asyncio
from collections.abc import Sequence

from predictor.generation.detokenizer import ContinuationDecoder
from predictor.generation.tokenizer import Tokenizer
from predictor.types import UNFINISHED_CHARACTER, Token, TokenLogprob

MAX_INLINE_TOKENS = 256
"""Number of tokens of a prompt, the most probable ones included, that are decoded at once, within a few ms."""


class LogprobsFormatter:
    """Formats the log probabilities of one sequence: token ids become text.

    A token's text is what it adds to the text before it.

    Args:
        tokenizer: the model's.
        context: token ids before the sequence, as of `left_context`.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._decoder = ContinuationDecoder(tokenizer, context, skip_special_tokens=False)
        self._special = frozenset(tokenizer.all_special_ids)

    def format(self, logprob: TokenLogprob) -> Token:
        """Return the next token as text, with the most probable ones."""
        top = tuple(
            self._token(token_id, value, rank=rank) for rank, (token_id, value) in enumerate(logprob.top, start=1)
        )
        token = self._token(logprob.token_id, logprob.logprob, top, logprob.rank)
        if not token.special and UNFINISHED_CHARACTER not in token.text:
            self._decoder.advance([token.id])
        return token

    def _token(
        self, token_id: int, logprob: float | None, top: tuple[Token, ...] = (), rank: int | None = None
    ) -> Token:
        return Token(token_id, self._decoder.decode([token_id]), logprob, token_id in self._special, top, rank)


async def format_prompt(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> tuple[Token, ...]:
    """Return the tokens of a prompt as text, without delaying the event loop if there are many."""

    def format_all() -> tuple[Token, ...]:
        return tuple(map(LogprobsFormatter(tokenizer).format, logprobs))

    num_tokens = sum(1 + len(logprob.top) for logprob in logprobs)
    return format_all() if num_tokens <= MAX_INLINE_TOKENS else await asyncio.to_thread(format_all)
