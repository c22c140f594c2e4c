"""Turn prompts and chats into token ids, and complete sampling parameters with the model's defaults.

Works with any transformers tokenizer without importing transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jinja2

from predictor.errors import InvalidRequest, PromptTooLong
from predictor.generation.tokenizer import Tokenizer
from predictor.types import Chat, GenerationRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Prompts:
    """Encodes requests for the engine.

    Args:
        tokenizer: the model's.
        context_tokens: maximum number of tokens of prompt and completion together.
        vocabulary_tokens: rows of the model's input embedding; token ids are below it.
        defaults: of the model; `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` are not None.
        default_max_tokens: maximum number of new tokens if neither the request nor `defaults` has one.
        unembedded_tokens: by id, the tokenizer's tokens for which the model has no embedding.
    """

    tokenizer: Tokenizer
    context_tokens: int
    vocabulary_tokens: int
    defaults: SamplingParams
    default_max_tokens: int
    unembedded_tokens: Mapping[int, str] = field(default_factory=dict)

    def encode(self, request: GenerationRequest) -> tuple[list[int], SamplingParams]:
        """Return the prompt's token ids and the complete sampling parameters.

        Raises:
            InvalidRequest: empty prompt, token without an embedding, no chat template, messages rejected by the
                template, or min_tokens too large.
            PromptTooLong: not one new token fits, or the prompt alone does not if none is requested.
        """
        token_ids = self._token_ids(request.prompt)
        if not token_ids:
            raise InvalidRequest("The prompt is empty. Send at least one character.")
        remaining = self.context_tokens - len(token_ids)
        if remaining < (0 if request.sampling.max_tokens == 0 else 1):
            raise PromptTooLong(
                f"The prompt is too long: {len(token_ids)} tokens. The context is {self.context_tokens} tokens for "
                "prompt and completion; shorten the prompt."
            )
        self._check_token_ids(token_ids, "the prompt")
        return token_ids, self._complete(request.sampling, remaining)

    def text(self, request: GenerationRequest) -> str:
        """Return the prompt as text, for an echo."""
        if isinstance(request.prompt, str):
            return request.prompt
        return self.tokenizer.decode(self._token_ids(request.prompt), skip_special_tokens=True)

    def _token_ids(self, prompt: str | tuple[int, ...] | Chat) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt, add_special_tokens=True)) if prompt else []
        if isinstance(prompt, tuple):
            return list(prompt)
        if not self.tokenizer.chat_template:
            raise InvalidRequest("This model has no chat template. Send the prompt as text instead of messages.")
        try:
            text = self.tokenizer.apply_chat_template(
                list(prompt.messages), tools=list(prompt.tools) or None, tokenize=False, add_generation_prompt=True
            )
        # A chat template is a program that comes with the weights; a message may make it raise any of these.
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(f"The model's chat template rejected the messages: {error}.") from error
        # The template's text has the special tokens already; adding them again would double the first one.
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _check_token_ids(self, token_ids: Sequence[int], where: str) -> None:
        """Raise InvalidRequest if the model has no embedding for an id; text may have such tokens too."""
        unknown = next((token_id for token_id in token_ids if not 0 <= token_id < self.vocabulary_tokens), None)
        if unknown is not None:
            token = self.unembedded_tokens.get(unknown)
            named = f"{unknown}" if token is None else f"{unknown}, {token!r}; remove it"
            raise InvalidRequest(
                f"Unknown token id in {where}: {named}. This model's are 0 to {self.vocabulary_tokens - 1}."
            )

    def _complete(self, sampling: SamplingParams, remaining: int) -> SamplingParams:
        self._check_token_ids(sampling.stop_token_ids, "stop_token_ids")
        defaults = self.defaults
        max_tokens = sampling.max_tokens
        if max_tokens is None:
            max_tokens = defaults.max_tokens or self.default_max_tokens
        if sampling.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is too large: {sampling.min_tokens}. Set it to at most max_tokens, {max_tokens}.",
                "min_tokens",
            )
        unset = {
            name: getattr(defaults, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if getattr(sampling, name) is None
        }
        max_tokens = min(max_tokens, remaining)
        return replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens), **unset)
