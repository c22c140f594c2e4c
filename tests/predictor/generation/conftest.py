"""Tokenizers of other kinds, and the demo model's prompts."""

import pytest
from transformers import PreTrainedTokenizerBase

from predictor.generation.chat_template import ChatTemplate
from predictor.generation.prompts import Prompts
from predictor.generation.structured_output import GrammarCompiler
from predictor.types import SamplingParams
from tests.predictor import sentencepiece


@pytest.fixture(scope="session", params=[sentencepiece.llama, sentencepiece.metaspace], ids=["llama", "metaspace"])
def sentencepiece_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """A tokenizer that removes the space of a text's first token."""
    tokenizer: PreTrainedTokenizerBase = request.param()
    return tokenizer


@pytest.fixture(scope="session", params=["byte-level", "llama", "metaspace"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One tokenizer of each kind."""
    if request.param == "byte-level":
        return tokenizer
    other: PreTrainedTokenizerBase = getattr(sentencepiece, request.param)()
    return other


@pytest.fixture(scope="session")
def greedy() -> SamplingParams:
    return SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerBase, greedy: SamplingParams) -> Prompts:
    return Prompts(
        tokenizer,
        ChatTemplate(tokenizer),
        GrammarCompiler(tokenizer, 512, frozenset([2])),
        context_tokens=64,
        vocabulary_tokens=300,
        defaults=greedy,
        default_max_tokens=16,
    )
