from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from predictor.generation.detokenizer import (
    MAX_CONTEXT_TOKENS,
    MAX_PENDING_TOKENS,
    Detokenizer,
    left_context,
)
from predictor.types import UNFINISHED_CHARACTER


def push_each(tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """Encode `text` and push its tokens one by one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, stop=stop)
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
    assert detokenizer.found_stop == "5=1"


def test_push_partial_stop_string_is_held_and_released(tokenizer: PreTrainedTokenizerBase) -> None:
    outputs = push_each(tokenizer, "1234", stop=("23x",))
    assert outputs[1] == ""
    assert "".join(outputs) == "1234"


def test_push_last_releases_partial_stop_string(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "".join(push_each(tokenizer, "12", stop=("23",))) == "12"


def test_push_several_stop_strings_earliest_wins(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "".join(push_each(tokenizer, "1 2 3 4", stop=("3", "2"))) == "1 "


def test_push_before_min_tokens_ignores_stop_strings(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("7",), min_tokens=3)
    ids = tokenizer.encode("7777", add_special_tokens=False)
    assert [detokenizer.push([token]) for token in ids] == ["7", "7", "", ""]
    assert detokenizer.found_stop == "7"


# Left context


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], chunks: Sequence[Sequence[int]]) -> str:
    """Text of the ids in `chunks`, pushed chunk by chunk after `prompt`."""
    detokenizer = Detokenizer(tokenizer, left_context(tokenizer, prompt))
    return "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.push([], last=True)


def decoded_difference(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """What `ids` add to the text of the whole prompt."""
    whole = str(tokenizer.decode([*prompt, *ids], skip_special_tokens=True))
    before = str(tokenizer.decode(list(prompt), skip_special_tokens=True))
    assert whole.startswith(before)
    return whole.removeprefix(before)


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    assert isinstance(ids, list)
    return ids


@pytest.mark.parametrize(
    ("prompt", "tokens", "text"),
    [
        (["<s>", "▁Once"], ["▁upon", "▁a", "▁time"], " upon a time"),
        (["<s>", "▁", "def", "<0x0A>"], ["▁", "▁▁", "▁return"], "    return"),
        (["▁a", "▁"], ["▁upon"], " upon"),
        (["<s>", "▁"], ["▁upon"], " upon"),
        (["▁a", "▁▁"], ["b"], "b"),
        (["<s>"], ["▁upon", "▁a"], "upon a"),
        ([], ["▁upon"], "upon"),
        (["▁a", "</s>", "<|assistant|>"], ["▁upon", "▁a"], "upon a"),
        (["<|assistant|>", "<0x0A>"], ["▁upon"], " upon"),
        (["<|assistant|>", "<0x0A>"], ["Once"], "Once"),
        (["▁a"], ["</s>", "▁upon"], " upon"),
    ],
    ids=[
        "word",
        "indentation",
        "after-space",
        "after-only-space",
        "after-spaces",
        "after-bos",
        "no-prompt",
        "after-generation-prompt",
        "after-newline",
        "after-newline-no-space",
        "skipped-token",
    ],
)
def test_push_keeps_space_of_first_token_unless_text_begins(
    sentencepiece_tokenizer: PreTrainedTokenizerBase, prompt: list[str], tokens: list[str], text: str
) -> None:
    before, ids = token_ids(sentencepiece_tokenizer, prompt), token_ids(sentencepiece_tokenizer, tokens)
    assert continuation(sentencepiece_tokenizer, before, [[token_id] for token_id in ids]) == text


def test_push_completes_a_character_that_the_prompt_began(any_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = any_tokenizer.encode("a👩", add_special_tokens=False)
    assert UNFINISHED_CHARACTER in any_tokenizer.decode(ids[:-2])
    assert continuation(any_tokenizer, ids[:-2], [[token_id] for token_id in ids[-2:]]) == "👩"


def test_push_after_replacement_character_returns_new_text_only(any_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = any_tokenizer.encode(f"a{UNFINISHED_CHARACTER}", add_special_tokens=False)
    assert continuation(any_tokenizer, prompt, [any_tokenizer.encode("b", add_special_tokens=False)[-1:]]) == "b"


def cut(ids: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
    """Cut `ids` at some of `ends`."""
    places = sorted({0, len(ids), *(end for end in ends if end < len(ids))})
    return [list(ids[start:end]) for start, end in pairwise(places)]


def units(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of whole characters and words, and of a special token."""
    if "<s>" in tokenizer.get_vocab():
        texts = ["▁upon", "▁", "▁▁", "b", "日", "<0x0A>", "<0xE2> <0x98> <0x83>", "<0xF0> <0x9F> <0x91> <0xA9>", "</s>"]
        return [token_ids(tokenizer, text.split(" ")) for text in texts]
    texts = [" upon", " ", "  ", "b", "日", "\n", "☃", "👩", "<|end|>"]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def joined(tokenizer: PreTrainedTokenizerBase, indices: Sequence[int]) -> list[int]:
    return [token_id for index in indices for token_id in units(tokenizer)[index]]


@given(
    prompt=st.lists(st.integers(0, 7), max_size=6),
    completion=st.lists(st.integers(0, 8), max_size=16),
    ends=st.lists(st.integers(0, 60), max_size=60),
)
@example(prompt=[3], completion=[1, 2, 0], ends=range(9))
@example(prompt=[1], completion=[8] * 20 + [0], ends=range(21))
@example(prompt=[6], completion=[7] * 8, ends=range(99))
def test_push_any_chunks_concatenate_to_difference_of_whole_texts(
    any_tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int], ends: Sequence[int]
) -> None:
    before, ids = joined(any_tokenizer, prompt), joined(any_tokenizer, completion)
    assert continuation(any_tokenizer, before, cut(ids, ends)) == decoded_difference(any_tokenizer, before, ids)


@given(ids=st.lists(st.integers(6, 511), max_size=40), ends=st.lists(st.integers(0, 40), max_size=40))
def test_push_bytes_that_are_not_text_concatenate_to_whole_text(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: Sequence[int]
) -> None:
    assert continuation(tokenizer, [], cut(ids, ends)) == tokenizer.decode(ids, skip_special_tokens=True)


class CountingTokenizer:
    """Counts the tokens of each call of `decode`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.all_special_ids = tokenizer.all_special_ids
        self.encode = tokenizer.encode
        self.decoded: list[int] = []

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.decoded.append(len(token_ids))
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


@pytest.mark.parametrize("tokens", [["</s>"], ["<unk>"], ["<0xFF>"], ["<0xE6>", "<0x97>"], ["▁"], ["<0x0A>", "<0xFF>"]])
def test_push_tokens_without_a_character_costs_bounded_work_per_token(
    sentencepiece_tokenizer: PreTrainedTokenizerBase, tokens: list[str]
) -> None:
    counting = CountingTokenizer(sentencepiece_tokenizer)
    detokenizer = Detokenizer(counting, left_context(counting, token_ids(sentencepiece_tokenizer, ["▁a"])))
    for token_id in token_ids(sentencepiece_tokenizer, tokens) * 300:
        counting.decoded.clear()
        detokenizer.push([token_id])
        assert len(counting.decoded) <= 3
        assert max(counting.decoded) <= 2 * MAX_PENDING_TOKENS
    words = token_ids(sentencepiece_tokenizer, ["▁upon", "▁a"])
    assert "".join(detokenizer.push([word]) for word in words).endswith(" upon a")


def test_push_unfinished_characters_are_returned_after_a_few_tokens(any_tokenizer: PreTrainedTokenizerBase) -> None:
    first_byte = any_tokenizer.encode("a👩", add_special_tokens=False)[-4]
    detokenizer = Detokenizer(any_tokenizer, left_context(any_tokenizer, [first_byte]))
    outputs = [detokenizer.push([first_byte]) for _ in range(100)]
    assert set("".join(outputs)) == {UNFINISHED_CHARACTER}
    assert len("".join(outputs)) >= 100 - MAX_PENDING_TOKENS


def test_left_context_of_long_prompt_decodes_its_tail_only(sentencepiece_tokenizer: PreTrainedTokenizerBase) -> None:
    counting = CountingTokenizer(sentencepiece_tokenizer)
    prompt = token_ids(sentencepiece_tokenizer, ["<0xFF>"]) * 1000
    assert left_context(counting, prompt) == prompt[:MAX_CONTEXT_TOKENS]
    assert max(counting.decoded) <= MAX_CONTEXT_TOKENS
