"""Turn prompts and chats into token ids, and complete sampling parameters with the model's defaults.

Works with any transformers tokenizer without importing transformers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from predictor.engine.grammar import Grammar
from predictor.errors import InvalidRequest, PromptTooLong
from predictor.generation import message_grammar
from predictor.generation.chat_template import ChatTemplate
from predictor.generation.control_tokens import BREAK
from predictor.generation.output_format import OutputFormat
from predictor.generation.output_parser import OutputParser
from predictor.generation.structured_output import GrammarCompiler
from predictor.generation.token_ids import check as check_token_ids
from predictor.generation.tokenizer import PromptTokenizer
from predictor.types import WHOLE_CONTEXT, Chat, GenerationRequest, SamplingParams, Tokenization

_CHARS_PER_TOKEN = 8
"""Text that is longer is encoded in parts first; most languages and code have 2 to 5."""
_LONG_CONTEXTS = 16
"""Texts that need not fit into the context, to be truncated or only counted, have this many times its tokens."""
_CUT_TOKENS = 1024
"""More tokens than cutting a text in two can add."""


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A request as the engine takes it."""

    token_ids: list[int]
    sampling: SamplingParams
    """Complete."""
    n: int
    """Number of completions."""
    echo: str
    """Text to put before each completion."""
    output_parser: Callable[[], OutputParser] | None = None
    """Returns a parser for one completion; None if all of it is text."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Encodes requests for the engine.

    Args:
        tokenizer: the model's.
        chat_template: the model's.
        grammars: compiler of structured outputs for the tokenizer.
        context_tokens: maximum number of tokens of prompt and completion together.
        vocabulary_tokens: rows of the model's input embedding; token ids are below it.
        defaults: of the model; `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` are not None.
        default_max_tokens: maximum number of new tokens if neither the request nor `defaults` has one.
        unembedded_tokens: by id, the tokenizer's tokens for which the model has no embedding.
        output_format: in which the model writes reasoning and tool calls, if known.
    """

    tokenizer: PromptTokenizer
    chat_template: ChatTemplate
    grammars: GrammarCompiler
    context_tokens: int
    vocabulary_tokens: int
    defaults: SamplingParams
    default_max_tokens: int
    unembedded_tokens: Mapping[int, str] = field(default_factory=dict)
    output_format: OutputFormat | None = None

    def encode(self, request: GenerationRequest) -> EncodedRequest:
        """Return all that the request's completions need.

        Raises:
            InvalidRequest: empty prompt, token without an embedding, no chat template, messages rejected by the
                template, min_tokens too large, or unsupported structured output.
            PromptTooLong: not one new token fits, or the prompt alone does not if none is requested.
        """
        prompt = request.prompt
        contexts = 1 if request.sampling.truncate_prompt_tokens is None else _LONG_CONTEXTS
        rendered = self.chat_template.render(prompt) if isinstance(prompt, Chat) else ""
        if isinstance(prompt, Chat):
            token_ids = self._encode_chat(rendered, contexts)
        else:
            token_ids = self._token_ids(prompt, contexts)
        num_tokens = len(token_ids)
        token_ids = self._truncate(token_ids, prompt, request.sampling)
        if not token_ids:
            raise InvalidRequest("The prompt is empty. Send at least one character.")
        remaining = self.context_tokens - len(token_ids)
        if remaining < (0 if request.sampling.max_tokens == 0 else 1):
            raise PromptTooLong(
                f"The prompt is too long: {len(token_ids)} tokens. The context is {self.context_tokens} tokens for "
                "prompt and completion; shorten the prompt."
            )
        self._check_token_ids(token_ids, "the prompt")
        sampling = self._complete(request.sampling, remaining)
        if grammar := self._grammar(request, rendered):
            sampling = replace(sampling, token_masks=(*sampling.token_masks, grammar.token_mask))
        echo = self._text(prompt, token_ids, is_truncated=len(token_ids) < num_tokens) if request.echo else ""
        output_parser = None
        if isinstance(prompt, Chat) and request.parse_output and self.output_format is not None:
            output_parser = _output_parser(self.output_format, prompt, rendered)
            if not sampling.ignore_eos:
                ends = (id_ for id_ in self.output_format.end_token_ids if id_ < self.vocabulary_tokens)
                sampling = replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *ends))
        return EncodedRequest(token_ids, sampling, request.n, echo, output_parser)

    def _text(self, prompt: str | tuple[int, ...] | Chat, token_ids: list[int], *, is_truncated: bool) -> str:
        if isinstance(prompt, str) and not is_truncated:
            return prompt
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def tokenize(self, prompt: str | Chat, *, add_special_tokens: bool, with_texts: bool) -> Tokenization:
        """Return the tokens of a text, or of a chat, which has its special tokens from the template.

        Raises:
            InvalidRequest: no chat template, or messages rejected by it.
            PromptTooLong: there are more than _LONG_CONTEXTS times the context's tokens.
        """
        if isinstance(prompt, Chat):
            token_ids = self._encode_chat(self.chat_template.render(prompt), _LONG_CONTEXTS)
        else:
            token_ids = self._encode(prompt, add_special_tokens=add_special_tokens, contexts=_LONG_CONTEXTS)
        self._check_length(len(token_ids), 0, _LONG_CONTEXTS)
        return Tokenization(token_ids, self.tokenizer.convert_ids_to_tokens(token_ids) if with_texts else None)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included.

        Raises:
            InvalidRequest: the model has no such token.
        """
        self._check_token_ids(token_ids, "tokens")
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def _truncate(
        self, token_ids: list[int], prompt: str | tuple[int, ...] | Chat, sampling: SamplingParams
    ) -> list[int]:
        """Return the last tokens of the prompt, if the request limits their number."""
        limit = sampling.truncate_prompt_tokens
        if limit == WHOLE_CONTEXT:
            new_tokens = sampling.max_tokens
            if new_tokens is None or new_tokens >= self.context_tokens:
                new_tokens = 1
            limit = self.context_tokens - new_tokens
        if limit is None or len(token_ids) <= limit:
            return token_ids
        # The token with which the tokenizer begins every text stays, as in transformers.
        first = self.tokenizer.encode("", add_special_tokens=True)[:1] if isinstance(prompt, str) else []
        kept = first if token_ids[:1] == first else []
        return kept + token_ids[len(token_ids) - limit + len(kept) :]

    def _token_ids(self, prompt: str | tuple[int, ...], contexts: int) -> list[int]:
        if isinstance(prompt, str):
            return self._encode(prompt, add_special_tokens=True, contexts=contexts) if prompt else []
        self._check_length(len(prompt), 0, contexts)
        return list(prompt)

    def _encode_chat(self, text: str, contexts: int) -> list[int]:
        """Encode a rendered chat; the parts between BREAKs on their own, which no control token then crosses."""
        encode = partial(self._encode, add_special_tokens=False, contexts=contexts)
        first, *others = text.split(BREAK)
        # The template's text has the special tokens already; adding them again would double the first one.
        token_ids = encode(first)
        # SentencePiece adds a space before a text. Here it goes before a line feed, which is removed with it.
        start = self.tokenizer.encode("\n", add_special_tokens=False)
        for other in others:
            self._check_length(len(token_ids), _CUT_TOKENS, contexts)
            part = encode("\n" + other)
            token_ids += part[len(start) :] if part[: len(start)] == start else encode(other)
        return token_ids

    def _encode(self, text: str, *, add_special_tokens: bool, contexts: int) -> list[int]:
        """Encode a text, or only as much of it as shows that it has more tokens than this number of contexts.

        The length in characters alone shows nothing: a token may stand for any number of spaces or unknown characters.
        """
        size = _CHARS_PER_TOKEN * (contexts * self.context_tokens + _CUT_TOKENS)
        while size < len(text):
            beginning = self.tokenizer.encode(text[:size], add_special_tokens=add_special_tokens)
            self._check_length(len(beginning), _CUT_TOKENS, contexts)
            size *= 4
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _check_length(self, token_count: int, tolerance: int, contexts: int) -> None:
        """Reject a prompt whose first `token_count` tokens exceed this number of contexts by more than `tolerance`."""
        limit = contexts * self.context_tokens
        if token_count > limit + tolerance:
            what = "the context for prompt and completion" if contexts == 1 else f"{contexts} times the context"
            raise PromptTooLong(f"The prompt is too long: more than {limit} tokens, {what}; shorten the prompt.")

    def _check_token_ids(self, token_ids: Sequence[int], where: str) -> None:
        check_token_ids(token_ids, where, self.vocabulary_tokens, self.unembedded_tokens)

    def _complete(self, sampling: SamplingParams, remaining: int) -> SamplingParams:
        self._check_token_ids(sampling.stop_token_ids, "stop_token_ids")
        self._check_token_ids(sampling.allowed_token_ids, "allowed_token_ids")
        self._check_token_ids([token_id for token_id, _ in sampling.logit_bias], "logit_bias")
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
        return replace(
            sampling,
            max_tokens=max_tokens,
            min_tokens=min(sampling.min_tokens or defaults.min_tokens, max_tokens),
            stop=tuple(dict.fromkeys(sampling.stop + defaults.stop)),
            no_repeat_ngram_size=sampling.no_repeat_ngram_size or defaults.no_repeat_ngram_size,
            suppress_tokens=sampling.suppress_tokens + defaults.suppress_tokens,
            begin_suppress_tokens=sampling.begin_suppress_tokens + defaults.begin_suppress_tokens,
            bad_words_ids=sampling.bad_words_ids + self._bad_words_ids(sampling.bad_words) + defaults.bad_words_ids,
            **unset,
        )

    def _grammar(self, request: GenerationRequest, rendered: str) -> Grammar | None:
        """Return the grammar of the completion; None if it may be any text."""
        prompt, answer = request.prompt, request.sampling.structured_output
        message = None
        if isinstance(prompt, Chat) and request.parse_output:
            message = message_grammar.for_chat(prompt, rendered, self.output_format, answer)
        if message is None and answer is None:
            return None
        if request.sampling.ignore_eos:
            raise InvalidRequest("ignore_eos contradicts structured output, which has an end. Omit it.", "ignore_eos")
        if message is not None:
            return self.grammars.compile_message(message)
        return self.grammars.compile(answer) if answer else None

    def _bad_words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        spellings = (spelling for word in words for spelling in (word, f" {word.lstrip()}"))
        encoded = (tuple(self.tokenizer.encode(spelling, add_special_tokens=False)) for spelling in spellings)
        return tuple(dict.fromkeys(token_ids for token_ids in encoded if token_ids))


def _output_parser(output_format: OutputFormat, chat: Chat, rendered: str) -> Callable[[], OutputParser] | None:
    if not output_format.regions(tools=bool(chat.tools)):
        return None
    return partial(
        OutputParser,
        output_format,
        rendered,
        chat.tools,
        continued=chat.continued_text,
        parallel_tool_calls=chat.parallel_tool_calls,
    )
