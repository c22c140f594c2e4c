"""Structured output: grammars on the demo tokenizer, followed by random logits and by the demo model."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from predictor.engine.sampler import SequenceSampler, TokenMask
from predictor.errors import InvalidRequest
from predictor.generation.structured_output import MAX_GRAMMAR_BYTES, GrammarCompiler
from predictor.types import GrammarKind, SamplingParams, StructuredOutput
from tests.predictor import sentencepiece
from tests.predictor.generation.json_schemas import SCHEMAS
from tests.predictor.generation.random_text import EOS, MAX_TOKENS, random_text

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMATS = jsonschema.FormatChecker(["uuid", "email", "ipv4", "ipv6"])
"""A grammar cannot express leap years, and jsonschema's check of times allows no offset."""


def schema(value: object) -> StructuredOutput:
    return StructuredOutput(GrammarKind.JSON_SCHEMA, json.dumps(value))


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 512, frozenset([EOS]))


def follow(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, constraint: StructuredOutput, seed: int
) -> str | None:
    """Return a random text that follows the constraint; None if it has not ended after `MAX_TOKENS`."""
    return random_text(compiler.compile(constraint), tokenizer, seed)


@pytest.mark.parametrize("seed", range(5))
def test_grammar_of_a_schema_random_logits_give_a_valid_instance(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    text = follow(compiler, tokenizer, schema(PERSON), seed)
    assert text is not None
    jsonschema.validate(json.loads(text), PERSON)


def test_grammar_of_a_regex_random_logits_match_it(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    expression = r"[0-9]{3}-[a-f]{1,4}(é|ü)"
    texts = [follow(compiler, tokenizer, StructuredOutput(GrammarKind.REGEX, expression), seed) for seed in range(5)]
    assert all(text and re.fullmatch(expression, text) for text in texts), texts


def test_grammar_of_choices_random_logits_give_each_choice(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    choices = ["yes", 'a "quoted" one', "two\nlines", "back\\slash /x/ %", "é😀", "yes, but"]
    constraint = StructuredOutput(GrammarKind.CHOICE, json.dumps(choices))
    assert {follow(compiler, tokenizer, constraint, seed) for seed in range(120)} == set(choices)


def test_grammar_with_spaces_of_sentencepiece_is_followed_or_refused() -> None:
    choice = "Once upon a time"
    constraint = StructuredOutput(GrammarKind.CHOICE, json.dumps([choice]))
    llama, metaspace = sentencepiece.llama(), sentencepiece.metaspace()
    compiler = GrammarCompiler(llama, 512, frozenset([EOS]))
    assert follow(compiler, llama, constraint, seed=1) == choice
    with pytest.raises(InvalidRequest, match="not available for this model's tokenizer: llguidance does not support"):
        GrammarCompiler(metaspace, 512, frozenset([EOS])).compile(constraint)


@pytest.mark.parametrize(
    "value",
    [
        {"const": -(2**53)},
        {"enum": [0.1, -123456.789, 1.5e-10, 2**53]},
        {"type": "integer", "minimum": 2**53 - 2, "maximum": 2**53},
        {"type": "integer", "minimum": 3, "maximum": 5, "default": 2**70},
        {
            "type": "object",
            "properties": {"const": {"type": "null", "examples": [1e300]}},
            "required": ["const"],
            "additionalProperties": False,
        },
    ],
)
def test_grammar_of_exact_numbers_gives_them(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, value: dict[str, Any]
) -> None:
    text = follow(compiler, tokenizer, schema(value), seed=1)
    assert text is not None
    jsonschema.validate(json.loads(text), value)


@pytest.mark.parametrize("text", ["<|end|>", "a\ufdd0b<|end|>", "a<|end|>b", "<|user|><|end|>", "<|<|end|>é"])
@pytest.mark.parametrize("kind", [GrammarKind.CHOICE, GrammarKind.REGEX, GrammarKind.JSON_SCHEMA])
def test_grammar_with_text_of_special_tokens_gives_it_as_text(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, kind: GrammarKind, text: str
) -> None:
    value = {
        GrammarKind.CHOICE: json.dumps([text]),
        GrammarKind.REGEX: re.escape(text),
        GrammarKind.JSON_SCHEMA: json.dumps({"const": text}),
    }[kind]
    expected = json.dumps(text, ensure_ascii=False) if kind is GrammarKind.JSON_SCHEMA else text
    assert follow(compiler, tokenizer, StructuredOutput(kind, value), seed=1) == expected


def test_grammar_in_lark_random_logits_follow_it(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    constraint = StructuredOutput(GrammarKind.GRAMMAR, 'start: pair ("," pair)*\npair: /[ab]/ "=" /[0-9]/')
    texts = [follow(compiler, tokenizer, constraint, seed) for seed in range(5)]
    assert all(text and re.fullmatch(r"[ab]=[0-9](,[ab]=[0-9])*", text) for text in texts), texts


@given(value=SCHEMAS, seed=st.integers(0, 1000))
def test_grammar_of_any_schema_finished_texts_validate(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, value: dict[str, Any], seed: int
) -> None:
    try:
        text = follow(compiler, tokenizer, schema(value), seed)
    except InvalidRequest as error:
        event(str(error)[:60])
        return
    if text is not None:
        jsonschema.validate(json.loads(text), value, format_checker=FORMATS)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (schema({"type": "object", "not": {}}), "JSON schema is not supported.*not"),
        (schema({"x-guidance": {"lenient": True}, "uniqueItems": True, "type": "array"}), "uniqueItems"),
        (schema({"type": "string", "format": "frob"}), "frob"),
        (schema({"const": -(2**63) + 1}), "const has a number with too many digits"),
        (schema({"items": {"enum": [1, {"a": [2**53 + 1]}]}}), "enum has a number with too many digits"),
        (schema({"properties": {"a": {"type": "number", "minimum": -1e300}}}), "minimum has a number with too many"),
        (schema({"const": 5.49938197180028e-112}), "const has a number with too many digits"),
        (
            StructuredOutput(GrammarKind.GRAMMAR, 'start: "a" b\nb: %json {"const": -9223372036854775807}'),
            "more than 16 digits, which %json does not support",
        ),
        (schema({"$ref": "http://example.org/x"}), "example.org"),
        (schema([1]), "JSON schema is not a JSON object"),
        (StructuredOutput(GrammarKind.JSON_SCHEMA, "{"), "JSON schema is not a JSON object"),
        (StructuredOutput(GrammarKind.REGEX, "a("), "regular expression is not supported.*unclosed group"),
        (StructuredOutput(GrammarKind.REGEX, "a(?=b)"), "look-around"),
        (StructuredOutput(GrammarKind.GRAMMAR, "start: x"), "grammar is not supported.*x"),
        (StructuredOutput(GrammarKind.REGEX, "a" * (MAX_GRAMMAR_BYTES + 1)), f"maximum is {MAX_GRAMMAR_BYTES}"),
    ],
)
def test_compile_unsupported_constraint_is_refused_by_name(
    compiler: GrammarCompiler, constraint: StructuredOutput, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        compiler.compile(constraint)


def test_compile_deep_schema_is_refused(compiler: GrammarCompiler) -> None:
    value: dict[str, Any] = {}
    for _ in range(300):
        value = {"type": "object", "properties": {"a": value}}
    with pytest.raises(InvalidRequest, match="recursion limit"):
        compiler.compile(schema(value))


def _chain_of_rules(name: str) -> StructuredOutput:
    rules = "\n".join(f"{name}{index}: {name}{index + 1}" for index in range(5000))
    return StructuredOutput(GrammarKind.GRAMMAR, f'start: {name}0\n{rules}\n{name}5000: "a"')


def test_compile_long_chains_of_rules_does_not_overflow_the_stack(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert follow(compiler, tokenizer, _chain_of_rules("r"), seed=1) == "a"
    assert follow(compiler, tokenizer, _chain_of_rules("T"), seed=1) == "a"
    names = [f"a{index}" for index in range(2000)]
    chain = {name: {"items": {"$ref": f"#/$defs/{following}"}} for name, following in pairwise(names)}
    value = {"type": "array", "items": {"$ref": "#/$defs/a0"}, "$defs": {**chain, names[-1]: {}}}
    compiler.compile(schema(value))


@pytest.mark.parametrize(
    "constraint",
    [StructuredOutput(GrammarKind.REGEX, r"[^\s\S]"), StructuredOutput(GrammarKind.GRAMMAR, "start: start")],
    ids=["regex", "grammar"],
)
def test_mask_constraint_that_no_text_matches_is_an_error(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, constraint: StructuredOutput
) -> None:
    with pytest.raises(InvalidRequest, match=r"^No text matches the structured output"):
        follow(compiler, tokenizer, constraint, seed=1)


def test_mask_ambiguous_grammar_exceeds_the_limits(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    constraint = StructuredOutput(GrammarKind.GRAMMAR, "start: s\ns: s s s | s s | /[a-z]/")
    mask = compiler.compile(constraint).token_mask()
    [a] = tokenizer.encode("a", add_special_tokens=False)

    def repeat() -> None:
        for length in range(MAX_TOKENS):
            mask([], [a] * length)

    with pytest.raises(InvalidRequest, match="too complex"):
        repeat()


def test_mask_excluded_tokens_contradict_the_grammar_is_an_error(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    [a] = tokenizer.encode("a", add_special_tokens=False)
    grammar = compiler.compile(StructuredOutput(GrammarKind.REGEX, "a"))
    sampling = SamplingParams(token_masks=(grammar.token_mask,), suppress_tokens=(a,))
    sampler = SequenceSampler(sampling, prompt_tokens=0, end_token_ids=())
    with pytest.raises(InvalidRequest, match="contradict"):
        sampler.exclusions(512, 0)


def test_mask_of_one_grammar_sequences_are_independent(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    grammar = compiler.compile(StructuredOutput(GrammarKind.CHOICE, '["ab", "cd"]'))
    first, second = grammar.token_mask(), grammar.token_mask()
    [a] = tokenizer.encode("a", add_special_tokens=False)
    assert _allowed(first, tokenizer, []) == {"ab", "cd", "a", "c"} & _texts(tokenizer)
    assert _allowed(first, tokenizer, [a]) == {"b"}
    assert _allowed(second, tokenizer, []) == {"ab", "cd", "a", "c"} & _texts(tokenizer)


def _texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {str(tokenizer.decode([token_id])) for token_id in range(512)}


def _allowed(mask: TokenMask, tokenizer: PreTrainedTokenizerBase, output: Sequence[int]) -> set[str]:
    allowed = np.unpackbits(mask([], output), bitorder="little").nonzero()[0].tolist()
    return {str(tokenizer.decode([token_id])) for token_id in allowed}
