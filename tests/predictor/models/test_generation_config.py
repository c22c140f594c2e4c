import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from predictor.errors import UnsupportedModel
from predictor.models.generation_config import GenerationConfig
from predictor.types import SamplingParams

VOCABULARY = 512
END = 2
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)


def write(directory: Path, config: dict[str, Any], generation_config: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config))
    return directory


def sampling_params(config: GenerationConfig) -> SamplingParams:
    return config.sampling_params(eos_token_ids={END}, vocabulary_tokens=VOCABULARY)


@pytest.mark.parametrize(
    ("model", "generation", "ids"),
    [
        ({}, {"eos_token_id": [3]}, {3, END}),
        ({}, {"eos_token_id": [3, 9]}, {3, 9, END}),
        ({}, {"eos_token_id": 9}, {9, END}),
        ({}, {"eos_token_id": None}, {END}),
        ({"eos_token_id": [4, 9]}, None, {4, 9, END}),
        ({"text_config": {"eos_token_id": 9}}, None, {9, END}),
        # Token 4 is special, 9 is a character.
        ({"eos_token_id": [4, 9]}, {"eos_token_id": 3}, {3, 4, END}),
        ({}, {"eos_token_id": [-1, 512]}, {END}),
    ],
    ids=["lacks-tokenizers", "several", "one", "null", "model", "text-model", "model-and-own", "impossible"],
)
def test_eos_token_ids_are_the_declared_ones_and_the_tokenizers(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: dict[str, Any],
    generation: dict[str, Any] | None,
    ids: set[int],
) -> None:
    config = GenerationConfig.read(write(tmp_path, model, generation))
    assert config.eos_token_ids(tokenizer, VOCABULARY) == ids


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.1}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.0}, {}),
        (
            {"do_sample": True, "temperature": 5.0, "min_p": 0.99, "top_k": -1, "top_p": None},
            {"temperature": 5.0, "min_p": 0.99},
        ),
        ({"max_length": 20, "max_new_tokens": 64, "min_new_tokens": 2}, {"max_tokens": 64, "min_tokens": 2}),
        ({"stop_strings": "="}, {"stop": ("=",)}),
        ({"stop_strings": ["=", "", "+"]}, {"stop": ("=", "+")}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        (
            {"suppress_tokens": [7, -1, 512], "begin_suppress_tokens": [8]},
            {"suppress_tokens": (7,), "begin_suppress_tokens": (8,)},
        ),
        # A word with a token that does not exist cannot occur, and the end of sequence is not a word.
        ({"bad_words_ids": [[7], [8, 9], [8, 512], [END], [END, 7], []]}, {"bad_words_ids": ((7,), (8, 9), (END, 7))}),
    ],
)
def test_sampling_params_are_the_defaults_of_the_file(
    tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    params = sampling_params(GenerationConfig.read(write(tmp_path, {"temperature": 3.0}, fields)))
    assert params == replace(GREEDY, **expected)
    assert caplog.messages == []


def test_read_without_file_takes_fields_of_the_models_config(tmp_path: Path) -> None:
    config = GenerationConfig.read(write(tmp_path, {"do_sample": True, "temperature": 0.5, "max_new_tokens": None}))
    assert (config.do_sample, config.temperature, config.max_new_tokens) == (True, 0.5, None)


def test_read_file_with_byte_order_mark_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path, {}, {"max_new_tokens": 3})
    path = directory / "generation_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert GenerationConfig.read(directory).max_new_tokens == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", r"cannot be read \(Expecting property name"),
        ("[]", "is not a JSON object"),
        ('{"temperature": -1}', r"cannot be used \(temperature: Input should be greater than or equal to 0\)"),
        ('{"do_sample": true, "top_p": 2}', r"cannot be used \(top_p: "),
        ('{"bad_words_ids": [[1, "x"]]}', r"cannot be used \(bad_words_ids\.0\.1: "),
        ('{"eos_token_id": "</s>"}', r"cannot be used \(eos_token_id\.0: "),
    ],
    ids=["cut-off", "list", "negative", "range", "nested", "type"],
)
def test_read_damaged_file_raises_with_its_name_and_the_reason(tmp_path: Path, content: str, reason: str) -> None:
    directory = write(tmp_path, {})
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(
        UnsupportedModel, match=rf"generation_config\.json {reason}.* Correct it, or download the model"
    ):
        GenerationConfig.read(directory)


def test_read_unsupported_fields_are_named_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"do_sample": True, "typical_p": 0.9, "num_beams": 4, "guidance_scale": 1.5, "eta_cutoff": 0.0}
    GenerationConfig.read(write(tmp_path, {}, {**fields, "length_penalty": 2.0, "use_cache": False}))
    [message] = caplog.messages
    assert "guidance_scale=1.5, num_beams=4, typical_p=0.9;" in message
    assert caplog.records[0].levelno == logging.WARNING


def test_read_unsupported_fields_without_effect_are_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"typical_p": 0.9, "num_beams": 1, "guidance_scale": 1.0, "min_length": 0, "sequence_bias": None}
    GenerationConfig.read(write(tmp_path, {}, {**fields, "max_length": 20, "encoder_repetition_penalty": 1.0}))
    assert caplog.messages == []
