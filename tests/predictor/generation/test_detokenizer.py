import pytest
from transformers import PreTrainedTokenizerBase

from predictor.generation.detokenizer import Detokenizer
from predictor.types import UNFINISHED_CHARACTER


def push_each(tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """Encode `text` and push its tokens one by one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, stop)
    return [detokenizer.push([token], last=index == len(ids) - 1) for index, token in enumerate(ids)]


@pytest.mark.parametrize(
    "text",
    ["What is 7 + 5?", "naïve café", "日本語 text", "👩‍🚀 in space 🇳🇿!", "a  b\n\n c", "…"],
    ids=["ascii", "latin", "cjk", "emoji", "whitespace", "ellipsis"],
)
def test_push_outputs_concatenate_to_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert "".join(push_each(tokenizer, text)) == text


def test_push_never_splits_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer.encode("👩", add_special_tokens=False)) > 1
    assert all(UNFINISHED_CHARACTER not in output for output in push_each(tokenizer, "one 👩 two"))


def test_push_last_returns_bytes_of_unfinished_character(tokenizer: PreTrainedTokenizerBase) -> None:
    first_byte = tokenizer.encode("👩", add_special_tokens=False)[:1]
    assert Detokenizer(tokenizer).push(first_byte, last=True) == UNFINISHED_CHARACTER


def test_push_stop_string_across_tokens_cuts_text(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("5=1",))
    text = "".join(detokenizer.push([token]) for token in tokenizer.encode("7+5=12 42", add_special_tokens=False))
    assert text == "7+"
    assert detokenizer.stopped


def test_push_partial_stop_string_is_held_and_released(tokenizer: PreTrainedTokenizerBase) -> None:
    outputs = push_each(tokenizer, "1234", stop=("23x",))
    assert outputs[1] == ""
    assert "".join(outputs) == "1234"


def test_push_last_releases_partial_stop_string(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "".join(push_each(tokenizer, "12", stop=("23",))) == "12"


def test_push_several_stop_strings_earliest_wins(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "".join(push_each(tokenizer, "1 2 3 4", stop=("3", "2"))) == "1 "


def test_push_before_min_tokens_ignores_stop_strings(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer, ("7",), min_tokens=3)
    ids = tokenizer.encode("7777", add_special_tokens=False)
    assert [detokenizer.push([token]) for token in ids] == ["7", "7", "", ""]
    assert detokenizer.stopped
