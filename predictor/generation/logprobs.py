"""Log probabilities of token ids, formatted as tokens with text."""

from collections.abc import Sequence

from predictor.generation.detokenizer import ContinuationDecoder
from predictor.generation.tokenizer import Tokenizer
from predictor.types import UNFINISHED_CHARACTER, Token, TokenLogprob


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
        """Return the next sampled token as text, with the most probable ones."""
        top = tuple(self._token(token_id, value) for token_id, value in logprob.top)
        token = self._token(logprob.token_id, logprob.logprob, top)
        if not token.special and UNFINISHED_CHARACTER not in token.text:
            self._decoder.advance([token.id])
        return token

    def _token(self, token_id: int, logprob: float, top: tuple[Token, ...] = ()) -> Token:
        return Token(token_id, self._decoder.decode([token_id]), logprob, token_id in self._special, top)
