"""Text becomes token ids and token ids become text: chat template, prompt limit, stop strings.

Knows nothing of batches or protocols; takes any transformers tokenizer and imports none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jinja2

from predictor.errors import InvalidRequest, PromptTooLong
from predictor.generation import Chat, GenerationRequest, SamplingParams, Token, TokenLogprob

UNFINISHED_CHARACTER = "�"
"""What decoding gives for bytes that need the next token to become a character."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any
    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...  # noqa: D102
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...  # noqa: D102
    def apply_chat_template(  # noqa: D102
        self, conversation: list[Any], *, tools: list[Any] | None, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Prompts:
    """Turns requests into what the engine takes.

    Args:
        tokenizer: the model's.
        context_tokens: prompt and completion together at most.
        vocabulary_tokens: token ids are below this.
        defaults: the model's own sampling; `temperature`, `top_p`, `top_k` and `repetition_penalty` not None.
        default_max_tokens: where neither the request nor `defaults` says.
    """

    tokenizer: Tokenizer
    context_tokens: int
    vocabulary_tokens: int
    defaults: SamplingParams
    default_max_tokens: int

    def encode(self, request: GenerationRequest) -> tuple[list[int], SamplingParams]:
        """The prompt's token ids, and the sampling with nothing left open.

        Raises:
            InvalidRequest: no text, no such token, no chat template, messages that the template refuses, max_tokens
                too large.
            PromptTooLong: not one new token would fit.
        """
        prompt = self._ids(request.prompt)
        if not prompt:
            raise InvalidRequest("The prompt is empty; send at least one character.")
        room = self.context_tokens - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"The prompt has {len(prompt)} tokens, but prompt and completion together may have "
                f"{self.context_tokens}; shorten the prompt."
            )
        return prompt, self._sampling(request.sampling, room)

    def text(self, request: GenerationRequest) -> str:
        """The prompt as text, for an echo."""
        if isinstance(request.prompt, str):
            return request.prompt
        return self.tokenizer.decode(self._ids(request.prompt), skip_special_tokens=True)

    def _ids(self, prompt: str | tuple[int, ...] | Chat) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt, add_special_tokens=True)) if prompt else []
        if isinstance(prompt, tuple):
            self._require_known(prompt, "The prompt")
            return list(prompt)
        if not self.tokenizer.chat_template:
            raise InvalidRequest("This model has no chat template; send the whole prompt as text instead of messages.")
        try:
            text = self.tokenizer.apply_chat_template(
                list(prompt.messages), tools=list(prompt.tools) or None, tokenize=False, add_generation_prompt=True
            )
        # A template is a program that comes with the weights: it may stumble over a message in any way.
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(f"The model's chat template refuses these messages: {error}.") from error
        # The template writes the special tokens itself; adding them again would double the first one.
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _require_known(self, token_ids: Sequence[int], where: str) -> None:
        unknown = next((token_id for token_id in token_ids if not 0 <= token_id < self.vocabulary_tokens), None)
        if unknown is not None:
            raise InvalidRequest(
                f"{where} has the token id {unknown}, but this model's are 0 to {self.vocabulary_tokens - 1}."
            )

    def _sampling(self, asked: SamplingParams, room: int) -> SamplingParams:
        if asked.max_tokens is not None and asked.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {asked.max_tokens}, but after this prompt there is room for {room} tokens of "
                f"{self.context_tokens}; lower it or shorten the prompt.",
                "max_tokens",
            )
        self._require_known(asked.stop_token_ids, "stop_token_ids")
        defaults = self.defaults
        max_tokens = asked.max_tokens or min(defaults.max_tokens or self.default_max_tokens, room)
        if asked.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens is {asked.min_tokens}, more than max_tokens, {max_tokens}.", "min_tokens")
        return replace(
            asked,
            max_tokens=max_tokens,
            temperature=defaults.temperature if asked.temperature is None else asked.temperature,
            top_p=defaults.top_p if asked.top_p is None else asked.top_p,
            top_k=defaults.top_k if asked.top_k is None else asked.top_k,
            repetition_penalty=(
                defaults.repetition_penalty if asked.repetition_penalty is None else asked.repetition_penalty
            ),
        )


class TokenNames:
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


class Detokenizer:
    """Token ids to text, piece by piece: a piece never ends inside a character, nor inside a possible stop string.

    Args:
        tokenizer: the model's.
        stop: texts that end the completion.
        min_tokens: so many ids must have come before a stop string counts.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._ids: list[int] = []
        self._context = 0
        """Ids before this one were decoded to text that is done with."""
        self._decoded = 0
        """Ids from `_context` up to here are decoded, and are the left context of the next."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string has been met; text from there on is dropped."""

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that is now certain, "" if none.

        Args:
            token_ids: the next ids of the sequence.
            last: nothing follows; whatever was held back comes out.
        """
        if self.stopped:
            return ""
        self._ids.extend(token_ids)
        text = self._held + self._decode(last)
        self._held = ""
        if len(self._ids) < self._min_tokens:
            return text
        if (end := self._stop_position(text)) is not None:
            self.stopped = True
            return text[:end]
        if not last:
            certain = len(text) - self._possible_stop(text)
            text, self._held = text[:certain], text[certain:]
        return text

    def _decode(self, last: bool) -> str:
        """New text of the ids pushed.

        The ids decoded last are decoded again with the new ones, and their text cut off, since many tokenizers
        write a token differently at the beginning of a text.
        """
        before = self._text(self._ids[self._context : self._decoded])
        after = self._text(self._ids[self._context :])
        if len(after) <= len(before) or (after.endswith(UNFINISHED_CHARACTER) and not last):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return after[len(before) :]

    def _text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _stop_position(self, text: str) -> int | None:
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        return min(found, default=None)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        return next(
            (
                length
                for length in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stop)
            ),
            0,
        )
