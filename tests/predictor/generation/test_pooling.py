"""Truncation of texts and pairs to embed or classify, compared with that of transformers' tokenizer."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers

from devtools import tiny_poolers
from devtools.tiny_poolers import WORDS
from predictor.generation.pooling import PoolingInputs
from predictor.types import Pooling, PoolingRequest, Task

LENGTHS = [(0, 9), (1, 9), (9, 1), (3, 10), (4, 10), (5, 5), (10, 12), (12, 10), (20, 20)]


def words(count: int) -> str:
    return " ".join(WORDS[:count])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_poolers.save_tokenizer(folder, pair_types=True)
    return folder


@pytest.fixture
def inputs(directory: Path) -> PoolingInputs:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return PoolingInputs(tokenizer, Pooling(task=Task.CLASSIFY), 1, 64, 205, {})


def encode(inputs: PoolingInputs, text: Any, limit: int | None) -> Any:
    [encoded] = inputs.encode(PoolingRequest(task=Task.CLASSIFY, inputs=[text], truncate_prompt_tokens=limit))
    return encoded


@pytest.mark.parametrize("limit", [4, 5, 10, 11, 23])
def test_truncation_is_that_of_the_tokenizer(directory: Path, inputs: PoolingInputs, limit: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for first, second in LENGTHS:
        texts = words(first), words(second)
        encoded = encode(inputs, texts, limit)
        expected = tokenizer(*texts, truncation=True, max_length=limit)
        assert encoded.token_ids == expected["input_ids"], (first, second)
        assert encoded.token_type_ids == expected["token_type_ids"]
        if first:
            expected = tokenizer(texts[0], truncation=True, max_length=limit)
            assert encode(inputs, texts[0], limit).token_ids == expected["input_ids"]


def test_threads_with_different_limits_share_the_tokenizer(inputs: PoolingInputs) -> None:
    limits = [None, 4, 10, 30] * 100
    with ThreadPoolExecutor(4) as threads:
        lengths = list(threads.map(lambda limit: len(encode(inputs, words(40), limit).token_ids), limits))
    assert lengths == [42, 4, 10, 30] * 100
