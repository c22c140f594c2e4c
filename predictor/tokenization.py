"""Text becomes token ids and token ids become text: chat template, prompt limit, stop strings.

Knows nothing of batches or protocols; takes any transformers tokenizer and imports none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jinja2

from predictor.errors import InvalidRequest, PromptTooLong
from predictor.generation import GenerationRequest, Message, SamplingParams

UNFINISHED_CHARACTER = "�"
"""What decoding gives for bytes that need the next token to become a character."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...  # noqa: D102
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...  # noqa: D102
    def apply_chat_template(self, conversation: list[Any], *, tokenize: bool, add_generation_prompt: bool) -> str: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Prompts:
    """Turns requests into what the engine takes.

    Args:
        tokenizer: the model's.
        context_tokens: prompt and completion together at most.
        defaults: the model's own sampling; `temperature`, `top_p` and `top_k` not None.
        default_max_tokens: where neither the request nor `defaults` says.
    """

    tokenizer: Tokenizer
    context_tokens: int
    defaults: SamplingParams
    default_max_tokens: int

    def encode(self, request: GenerationRequest) -> tuple[list[int], SamplingParams]:
        """The prompt's token ids, and the sampling with nothing left open.

        Raises:
            InvalidRequest: no text, no chat template, messages that the template refuses, max_tokens too large.
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

    def _ids(self, prompt: str | tuple[Message, ...]) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt, add_special_tokens=True)) if prompt else []
        if not self.tokenizer.chat_template:
            raise InvalidRequest("This model has no chat template; send the whole prompt as text_input.")
        try:
            text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InvalidRequest(f"The model's chat template refuses these messages: {error}.") from error
        # The template writes the special tokens itself; adding them again would double the first one.
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _sampling(self, asked: SamplingParams, room: int) -> SamplingParams:
        if asked.max_tokens is not None and asked.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {asked.max_tokens}, but after this prompt there is room for {room} tokens of "
                f"{self.context_tokens}; lower it or shorten the prompt."
            )
        defaults = self.defaults
        return replace(
            asked,
            max_tokens=asked.max_tokens or min(defaults.max_tokens or self.default_max_tokens, room),
            temperature=defaults.temperature if asked.temperature is None else asked.temperature,
            top_p=defaults.top_p if asked.top_p is None else asked.top_p,
            top_k=defaults.top_k if asked.top_k is None else asked.top_k,
        )


class Detokenizer:
    """Token ids to text, piece by piece: a piece never ends inside a character, nor inside a possible stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
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
