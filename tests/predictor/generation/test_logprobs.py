import pytest
from transformers import PreTrainedTokenizerBase

from predictor.generation.detokenizer import Detokenizer
from predictor.generation.logprobs import LogprobsFormatter
from predictor.types import UNFINISHED_CHARACTER, TokenLogprob


def test_format_returns_text_and_special_flag_of_all_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    [seven] = tokenizer.encode("7", add_special_tokens=False)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    token = LogprobsFormatter(tokenizer).format(TokenLogprob(end, -0.5, ((end, -0.5), (seven, -1.0))))
    assert (token.text, token.special, token.logprob) == ("<|end|>", True, -0.5)
    assert [(other.text, other.special) for other in token.top] == [("<|end|>", True), ("7", False)]


def test_format_text_of_each_token_begins_with_its_space(sentencepiece_tokenizer: PreTrainedTokenizerBase) -> None:
    once, upon, a, time = sentencepiece_tokenizer.encode("Once upon a time", add_special_tokens=False)
    formatter = LogprobsFormatter(sentencepiece_tokenizer, [once])
    token = formatter.format(TokenLogprob(upon, -0.5, ((upon, -0.5), (a, -1.0))))
    assert (token.text, [other.text for other in token.top]) == (" upon", [" upon", " a"])
    assert [formatter.format(TokenLogprob(token_id, -1.0)).text for token_id in (a, time)] == [" a", " time"]


@pytest.mark.parametrize("context", [[], ["b"]], ids=["beginning", "after-word"])
def test_format_texts_concatenate_to_text_of_the_sequence(
    sentencepiece_tokenizer: PreTrainedTokenizerBase, context: list[str]
) -> None:
    tokens = ["▁Once", "▁upon", "<0x0A>", "▁", "▁▁", "▁return", "b", "▁a"]
    before = [int(sentencepiece_tokenizer.convert_tokens_to_ids(token)) for token in context]
    ids = [int(sentencepiece_tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    formatter = LogprobsFormatter(sentencepiece_tokenizer, before)
    texts = [formatter.format(TokenLogprob(token_id, -1.0)).text for token_id in ids]
    assert "".join(texts) == Detokenizer(sentencepiece_tokenizer, before).push(ids, last=True)


def test_format_part_of_a_character_has_no_text(any_tokenizer: PreTrainedTokenizerBase) -> None:
    a, *parts = any_tokenizer.encode("a👩", add_special_tokens=False)[-5:]
    formatter = LogprobsFormatter(any_tokenizer, [a])
    assert [formatter.format(TokenLogprob(part, -1.0)).text for part in parts] == [UNFINISHED_CHARACTER] * len(parts)


def test_format_special_token_after_a_word_is_its_name(sentencepiece_tokenizer: PreTrainedTokenizerBase) -> None:
    end = sentencepiece_tokenizer.eos_token_id
    assert isinstance(end, int)
    formatter = LogprobsFormatter(sentencepiece_tokenizer, sentencepiece_tokenizer.encode("a"))
    assert formatter.format(TokenLogprob(end, -1.0)).text == "</s>"
