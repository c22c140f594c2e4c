"""Text becomes token ids and token ids become text: chat template, prompt limit, stop strings.

Knows nothing of batches or protocols; takes any transformers tokenizer and imports none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jinja2

from predictor.errors import InvalidRequest, PromptTooLong
from predictor.generation.tokenizer import Tokenizer
from predictor.types import Chat, GenerationRequest, SamplingParams


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
