import pytest
from transformers import AutoTokenizer

from demo.processes import ROOT
from predictor.errors import InvalidRequest, PromptTooLong
from predictor.generation import GenerationRequest, SamplingParams
from predictor.tokenization import Detokenizer, Prompts

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0)


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "model")


@pytest.fixture
def prompts(tokenizer: AutoTokenizer) -> Prompts:
    return Prompts(tokenizer, context_tokens=64, defaults=GREEDY, default_max_tokens=16)


def pieces(tokenizer: AutoTokenizer, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """What comes out when the text's tokens go in one by one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, stop)
    return [detokenizer.push([token], last=index == len(ids) - 1) for index, token in enumerate(ids)]


def test_a_raw_prompt_begins_with_one_bos(prompts: Prompts, tokenizer: AutoTokenizer) -> None:
    ids, _ = prompts.encode(GenerationRequest("7+5="))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "7+5="


def test_a_chat_goes_through_the_template_with_one_bos(prompts: Prompts, tokenizer: AutoTokenizer) -> None:
    ids, _ = prompts.encode(GenerationRequest(({"role": "user", "content": "Hi"},)))
    assert tokenizer.decode(ids) == "<|begin|><|user|>Hi<|end|><|assistant|>"


def test_says_what_the_template_refuses(prompts: Prompts) -> None:
    with pytest.raises(InvalidRequest, match="role must be system, user or assistant, not judge"):
        prompts.encode(GenerationRequest(({"role": "judge", "content": "Hi"},)))


def test_refuses_a_chat_where_the_model_has_no_template(tokenizer: AutoTokenizer) -> None:
    class Bare:
        chat_template = None
        encode = tokenizer.encode
        decode = tokenizer.decode
        apply_chat_template = tokenizer.apply_chat_template

    with pytest.raises(InvalidRequest, match="no chat template; send the whole prompt as text_input"):
        Prompts(Bare(), 64, GREEDY, 16).encode(GenerationRequest(({"role": "user", "content": "Hi"},)))


def test_rejects_a_prompt_longer_than_the_context(prompts: Prompts) -> None:
    with pytest.raises(PromptTooLong, match=r"The prompt has 101 tokens, .* may have 64; shorten the prompt"):
        prompts.encode(GenerationRequest("1" * 100))


def test_rejects_an_empty_prompt(prompts: Prompts) -> None:
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        prompts.encode(GenerationRequest(""))


def test_rejects_more_tokens_than_there_is_room_for(prompts: Prompts) -> None:
    request = GenerationRequest("1" * 53, SamplingParams(max_tokens=11))
    with pytest.raises(InvalidRequest, match=r"max_tokens is 11, .* room for 10 tokens of 64"):
        prompts.encode(request)


def test_fills_in_the_models_own_sampling(tokenizer: AutoTokenizer) -> None:
    of_model = SamplingParams(max_tokens=40, temperature=0.7, top_p=0.8, top_k=20)
    prompts = Prompts(tokenizer, 64, of_model, default_max_tokens=16)
    _, sampling = prompts.encode(GenerationRequest("1", SamplingParams(temperature=0.0, stop=("x",))))
    assert sampling == SamplingParams(max_tokens=40, temperature=0.0, top_p=0.8, top_k=20, stop=("x",))


def test_the_default_number_of_tokens_is_cut_to_the_room(prompts: Prompts) -> None:
    _, sampling = prompts.encode(GenerationRequest("1" * 58))
    assert sampling.max_tokens == 5


@pytest.mark.parametrize(
    "text", ["What is 7 + 5?", "naïve café", "日本語 text", "👩‍🚀 in space 🇳🇿!", "a  b\n\n c", "…"]
)
def test_the_pieces_add_up_to_the_text(tokenizer: AutoTokenizer, text: str) -> None:
    assert "".join(pieces(tokenizer, text)) == text


def test_a_piece_never_ends_inside_a_character(tokenizer: AutoTokenizer) -> None:
    assert len(tokenizer.encode("👩", add_special_tokens=False)) > 1
    assert all("�" not in piece for piece in pieces(tokenizer, "one 👩 two"))


def test_bytes_that_never_become_a_character_come_out_at_the_end(tokenizer: AutoTokenizer) -> None:
    first_byte = tokenizer.encode("👩", add_special_tokens=False)[:1]
    assert Detokenizer(tokenizer).push(first_byte, last=True) == "�"


def test_cuts_at_a_stop_string_that_spans_tokens(tokenizer: AutoTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("5=1",))
    text = "".join(detokenizer.push([token]) for token in tokenizer.encode("7+5=12 42", add_special_tokens=False))
    assert text == "7+"
    assert detokenizer.stopped


def test_holds_back_what_may_be_a_stop_string_and_lets_it_go(tokenizer: AutoTokenizer) -> None:
    came = pieces(tokenizer, "1234", stop=("23x",))
    assert came[1] == ""
    assert "".join(came) == "1234"


def test_the_earliest_stop_string_wins(tokenizer: AutoTokenizer) -> None:
    assert "".join(pieces(tokenizer, "1 2 3 4", stop=("3", "2"))) == "1 "


def test_text_held_back_comes_out_at_the_end(tokenizer: AutoTokenizer) -> None:
    assert "".join(pieces(tokenizer, "12", stop=("23",))) == "12"
