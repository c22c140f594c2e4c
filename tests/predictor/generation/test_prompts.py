import pytest
from transformers import AutoTokenizer

from devtools.processes import ROOT
from predictor.errors import InvalidRequest, PromptTooLong
from predictor.generation.detokenizer import Detokenizer
from predictor.generation.logprobs import LogprobsFormatter
from predictor.generation.prompts import Prompts
from predictor.types import Chat, GenerationRequest, SamplingParams, TokenLogprob

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "model")


@pytest.fixture
def prompts(tokenizer: AutoTokenizer) -> Prompts:
    return Prompts(tokenizer, context_tokens=64, vocabulary_tokens=300, defaults=GREEDY, default_max_tokens=16)


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
    ids, _ = prompts.encode(GenerationRequest(Chat(({"role": "user", "content": "Hi"},))))
    assert tokenizer.decode(ids) == "<|begin|><|user|>Hi<|end|><|assistant|>"


def test_says_what_the_template_refuses(prompts: Prompts) -> None:
    with pytest.raises(InvalidRequest, match="role must be system, user or assistant, not judge"):
        prompts.encode(GenerationRequest(Chat(({"role": "judge", "content": "Hi"},))))


def test_refuses_a_chat_where_the_model_has_no_template(tokenizer: AutoTokenizer) -> None:
    class Bare:
        chat_template = None
        all_special_ids = tokenizer.all_special_ids
        encode = tokenizer.encode
        decode = tokenizer.decode
        apply_chat_template = tokenizer.apply_chat_template

    with pytest.raises(InvalidRequest, match="no chat template; send the whole prompt as text instead"):
        Prompts(Bare(), 64, 300, GREEDY, 16).encode(GenerationRequest(Chat(({"role": "user", "content": "Hi"},))))


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
    of_model = SamplingParams(max_tokens=40, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    prompts = Prompts(tokenizer, 64, 300, of_model, default_max_tokens=16)
    _, sampling = prompts.encode(GenerationRequest("1", SamplingParams(temperature=0.0, stop=("x",))))
    assert sampling == SamplingParams(
        max_tokens=40, temperature=0.0, top_p=0.8, top_k=20, repetition_penalty=1.1, stop=("x",)
    )


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


def test_takes_token_ids_as_they_are_and_echoes_their_text(prompts: Prompts, tokenizer: AutoTokenizer) -> None:
    ids = tuple(tokenizer.encode("7+5=", add_special_tokens=False))
    request = GenerationRequest(ids)
    assert prompts.encode(request)[0] == list(ids)
    assert prompts.text(request) == "7+5="


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest((5, 300)), "The prompt has the token id 300, but this model's are 0 to 299"),
        (GenerationRequest("1", SamplingParams(stop_token_ids=(301,))), "stop_token_ids has the token id 301"),
        (GenerationRequest("1", SamplingParams(max_tokens=2, min_tokens=3)), "min_tokens is 3, more than max_tokens"),
    ],
)
def test_refuses_what_the_model_cannot_do(prompts: Prompts, request_: GenerationRequest, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        prompts.encode(request_)


def test_offers_tools_to_the_template(tokenizer: AutoTokenizer) -> None:
    class Offering:
        chat_template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
        all_special_ids = tokenizer.all_special_ids
        encode = tokenizer.encode
        decode = tokenizer.decode

        def apply_chat_template(self, conversation: list[object], **options: object) -> str:
            return tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **options)

    chat = Chat(({"role": "user", "content": "Hi"},), ({"type": "function", "function": {"name": "7+5="}},))
    ids, _ = Prompts(Offering(), 64, 300, GREEDY, 16).encode(GenerationRequest(chat))
    assert tokenizer.decode(ids) == "7+5="


def test_stop_strings_wait_for_min_tokens(tokenizer: AutoTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ("7",), min_tokens=3)
    ids = tokenizer.encode("7777", add_special_tokens=False)
    assert [detokenizer.push([token]) for token in ids] == ["7", "7", "", ""]
    assert detokenizer.stopped


def test_names_tokens_and_their_rivals(tokenizer: AutoTokenizer) -> None:
    [seven] = tokenizer.encode("7", add_special_tokens=False)
    end = tokenizer.eos_token_id
    token = LogprobsFormatter(tokenizer).format(TokenLogprob(end, -0.5, ((end, -0.5), (seven, -1.0))))
    assert (token.text, token.special, token.logprob) == ("<|end|>", True, -0.5)
    assert [(rival.text, rival.special) for rival in token.top] == [("<|end|>", True), ("7", False)]
