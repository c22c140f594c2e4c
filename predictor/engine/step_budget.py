"""Prompt tokens of a step in which sequences decode, so that a long prompt does not hold up running streams."""

MIXED_STEP_RATIO = 2.0
"""Aim for the duration of a step with tokens of prompts, in durations of one without."""
MIN_PROMPT_TOKENS = 16
"""Tokens of prompts that a step may have at least, so that prompts end."""
_SMOOTHING = 0.2
"""Weight of the newest step in an average."""
_LARGEST_STEP = 2.0
"""Times the average that one step counts at most: a pause of the machine says nothing about the next steps."""


class StepBudget:
    """Averages of what steps took on this machine, from which only follows how prompts are divided.

    Attention in C gives the same results however they are; that of torch may round otherwise.
    """

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        """Of a step without tokens of prompts."""
        self._token_seconds: float | None = None
        """Of a token of a prompt."""

    def record(self, decode_tokens: int, prompt_tokens: int, seconds: float) -> None:
        """Add a step with these numbers of tokens of decoding sequences and of prompts."""
        if not prompt_tokens:
            self._decode_seconds = _average(self._decode_seconds, seconds)
            return
        of_prompts = seconds - (self._decode_seconds or 0.0) if decode_tokens else seconds
        self._token_seconds = _average(self._token_seconds, max(0.0, of_prompts) / prompt_tokens)

    def prompt_tokens(self) -> int | None:
        """Return how many tokens of prompts a step may have while sequences decode; None if that is not known yet."""
        if self._decode_seconds is None or not self._token_seconds:
            return None
        return max(MIN_PROMPT_TOKENS, int((MIXED_STEP_RATIO - 1) * self._decode_seconds / self._token_seconds))


def _average(before: float | None, newest: float) -> float:
    if before is None:
        return newest
    return before + _SMOOTHING * (min(newest, _LARGEST_STEP * before) - before)
