"""Structured output: restrict a completion to a JSON schema, a regular expression, a list of choices or a grammar.

llguidance compiles each to a grammar over the tokenizer's tokens. Before a token is sampled, the logits of all tokens
that the grammar does not allow next become minus infinity; the end of the sequence is allowed once the text is
complete.
"""

import json
import re
import threading
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.hf import from_tokenizer

from predictor.engine.grammar import Grammar, summary
from predictor.errors import InvalidRequest
from predictor.generation import schema_numbers
from predictor.generation.control_tokens import BREAK, ControlTokens
from predictor.generation.message_grammar import MessageGrammar
from predictor.resources.large_stack import run_with_large_stack
from predictor.types import GrammarKind, StructuredOutput

MAX_GRAMMAR_BYTES = 131_072
"""Maximum size of a schema, expression or grammar."""

CACHED_GRAMMARS = 64

_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=50_000, step_max_items=2_000, max_lexer_states=50_000
)
"""Below llguidance's defaults, with which a token of an ambiguous grammar can take 0.1 s; it fails before that."""

_WHITESPACE = r" |\n[ \t]{0,16}"
"""Between JSON's tokens: a space, or a line break and an indentation. A model could repeat any whitespace endlessly."""

_LONG_NUMBER = re.compile(r"\d{17}")
"""Numbers that overflow llguidance's stack in a schema."""


class GrammarCompiler:
    """Compiles structured outputs for one tokenizer; safe to call from several threads.

    Args:
        tokenizer: the model's, a fast tokenizer of transformers.
        vocabulary_tokens: number of logits.
        eos_token_ids: tokens that end a sequence.
    """

    def __init__(self, tokenizer: Any, vocabulary_tokens: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_tokens = max(vocabulary_tokens, len(tokenizer))
        self._eos_token_ids = sorted(eos_token_ids)
        self._special_token_ids = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._lock = threading.Lock()
        self._llguidance_tokenizer: LLTokenizer | None = None
        self._compile = lru_cache(CACHED_GRAMMARS)(self._compile_uncached)

    def compile(self, constraint: StructuredOutput) -> Grammar:
        """Compile a constraint; takes milliseconds, and seconds the first time.

        Raises:
            InvalidRequest: it is invalid, too large, or uses a keyword that is not supported.
        """
        return self._compile(constraint.kind, _to_grammar(constraint.kind, constraint))

    def compile_message(self, message: MessageGrammar) -> Grammar:
        """Compile the grammar of an assistant's message, in the same way."""
        parts = dict(message.constraints())
        subgrammars = [
            {**_subgrammar(_to_grammar(name, part)), "name": f"part{index}"}
            for index, (name, part) in enumerate(parts.items())
        ]
        grammar = {"grammars": [{"lark_grammar": message.to_lark(self._to_symbols)}, *subgrammars]}
        try:
            return self._compile("message", json.dumps(grammar))
        except InvalidRequest:
            # llguidance's message does not name the part.
            for name, part in parts.items():
                self._compile(name, _to_grammar(name, part))
            raise

    def _to_symbols(self, text: str) -> str:
        """Return a text in Lark's notation, special tokens as tokens."""
        ids = self._special_token_ids
        parts = re.split(f"({'|'.join(map(re.escape, sorted(ids, key=len, reverse=True)))})", text) if ids else [text]
        return " ".join(f"<[{ids[part]}]>" if part in ids else json.dumps(part) for part in parts if part)

    def _compile_uncached(self, name: str, grammar: str) -> Grammar:
        tokenizer = self._get_tokenizer()

        def compile_() -> LLMatcher | str:
            is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer, limits=_LIMITS)
            return messages[0] if is_error else LLMatcher(tokenizer, grammar, limits=_LIMITS, log_level=0)

        compiled = run_with_large_stack(compile_)
        if isinstance(compiled, str):
            raise InvalidRequest(f"The {name} is not supported: {summary(compiled)}.")
        return Grammar(compiled, self._vocabulary_tokens)

    def _get_tokenizer(self) -> LLTokenizer:
        """Return the tokenizer as llguidance's, which takes seconds to build for a large vocabulary."""
        if not self._eos_token_ids:
            raise InvalidRequest("Structured output is not available: the model has no end-of-sequence token.")
        with self._lock:
            if self._llguidance_tokenizer is None:
                try:
                    self._llguidance_tokenizer = self._make_tokenizer()
                except ValueError as error:
                    raise InvalidRequest(
                        f"Structured output is not available for this model's tokenizer: {error}."
                    ) from error
            return self._llguidance_tokenizer

    def _make_tokenizer(self) -> LLTokenizer:
        vocabulary_tokens, eos_token_ids = self._vocabulary_tokens, self._eos_token_ids
        tokenizer = from_tokenizer(self._tokenizer, n_vocab=vocabulary_tokens, eos_token=eos_token_ids)
        probe = self._tokenizer.encode("a b", add_special_tokens=False)
        # llguidance reads most decoders, but not Metaspace, whose spaces it takes for another character.
        if tokenizer.decode_str(probe).strip() != self._tokenizer.decode(probe).strip():
            raise ValueError("llguidance does not support its decoder")
        wrapper = TokenizerWrapper(_TextTokenizer(tokenizer, ControlTokens(self._tokenizer)))
        return LLTokenizer(wrapper, n_vocab=vocabulary_tokens, eos_token=eos_token_ids)


class _TextTokenizer:
    """Encodes text that a grammar requires, without special tokens, as llguidance's TokenizerWrapper needs it.

    llguidance's own tokenizer encodes `</s>` in a required text as the special token, which ends the completion.

    Args:
        tokenizer: llguidance's, of the same vocabulary.
        special_tokens: those of the model.
    """

    def __init__(self, tokenizer: LLTokenizer, special_tokens: ControlTokens) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = tokenizer.eos_token
        self.bos_token_id = None
        self.tokens = [tokenizer.decode_bytes([token_id]) for token_id in ids]
        self.special_token_ids = [token_id for token_id in ids if tokenizer.is_special_token(token_id)]
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens

    def __call__(self, text: bytes) -> list[int]:
        token_ids: list[int] = []
        for index, piece in enumerate(text.decode().split(BREAK)):
            # Escaping removes a BREAK that belongs to the text.
            for part in ([BREAK] if index else []) + self._special_tokens.escape(piece).split(BREAK):
                token_ids += self._tokenizer.tokenize_str(part)
        return token_ids


def _to_grammar(name: str, constraint: StructuredOutput) -> str:
    """Return a constraint in llguidance's own notation; `name` is for messages.

    Raises:
        InvalidRequest: it is too large or not JSON.
    """
    size_bytes = len(constraint.value.encode())
    if size_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"The {name} has {size_bytes} bytes. The maximum is {MAX_GRAMMAR_BYTES}; simplify it.")
    match constraint.kind:
        case GrammarKind.JSON_SCHEMA:
            try:
                schema_numbers.check(json.loads(constraint.value))
                # As overrides, which a schema's `x-guidance` cannot change.
                return LLMatcher.grammar_from_json_schema(
                    constraint.value,
                    overrides={"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False},
                )
            except ValueError as error:
                raise InvalidRequest(f"The {name} is not a JSON object: {error}.") from error
            except RecursionError:
                raise InvalidRequest(f"The {name} is nested too deeply. Simplify it.") from None
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.value)
        case GrammarKind.CHOICE:
            choices: list[str] = json.loads(constraint.value)
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices)))
        case GrammarKind.GRAMMAR:
            if "%json" in constraint.value and _LONG_NUMBER.search(constraint.value):
                raise InvalidRequest("The grammar has a number of more than 16 digits, which %json does not support.")
            return LLMatcher.grammar_from_lark(constraint.value)


def _subgrammar(grammar: str) -> dict[str, Any]:
    """Return a grammar of `_to_grammar` as a part of another one."""
    if not grammar.startswith('{"grammars":'):
        return {"lark_grammar": grammar}
    [subgrammar] = json.loads(grammar)["grammars"]
    return dict(subgrammar)
