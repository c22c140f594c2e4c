"""Log probabilities of token ids as tokens with text."""

from predictor.generation.tokenizer import Tokenizer
from predictor.types import Token, TokenLogprob


class LogprobsFormatter:
    """What generated tokens are called, where a request asks for log probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)

    def name(self, chosen: TokenLogprob) -> Token:
        """The token as text, and its rivals."""
        top = tuple(self._token(token_id, logprob) for token_id, logprob in chosen.top)
        return self._token(chosen.token_id, chosen.logprob, top)

    def _token(self, token_id: int, logprob: float, top: tuple[Token, ...] = ()) -> Token:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return Token(token_id, text, logprob, token_id in self._special, top)
