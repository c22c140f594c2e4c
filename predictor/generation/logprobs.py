"""Log probabilities of token ids, formatted as tokens with text."""

from predictor.generation.tokenizer import Tokenizer
from predictor.types import Token, TokenLogprob


class LogprobsFormatter:
    """Formats log probabilities: token ids become text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)

    def format(self, logprob: TokenLogprob) -> Token:
        """Return the sampled token as text, with the most probable ones."""
        top = tuple(self._token(token_id, value) for token_id, value in logprob.top)
        return self._token(logprob.token_id, logprob.logprob, top)

    def _token(self, token_id: int, logprob: float, top: tuple[Token, ...] = ()) -> Token:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return Token(token_id, text, logprob, token_id in self._special, top)
