"""OpenAI's and Triton's clients with a running predictor; KServe's is in `routes/test_open_inference.py`."""

from collections.abc import Iterator

import numpy
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tritonclient import http as triton

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 17 + 25?"}]
ANSWER = "7+5=12 1+2+1=4 42"


@pytest.fixture
def triton_client(server_url: str) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(server_url.removeprefix("http://"), network_timeout=300)
    try:
        yield client
    finally:
        client.close()


def test_openai_client_lists_and_retrieves_the_model(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["demo"]
    assert openai_client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("other")


def test_openai_client_chat_returns_a_completion(openai_client: openai.OpenAI) -> None:
    completion = openai_client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    [choice] = completion.choices
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_openai_client_chat_stream_ends_with_usage(openai_client: openai.OpenAI) -> None:
    chunks = list(
        openai_client.chat.completions.create(
            model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == ANSWER
    assert len([delta for delta in deltas if delta]) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []


def test_openai_client_n_completions_with_a_seed_are_repeatable(openai_client: openai.OpenAI) -> None:
    def generate() -> list[str]:
        completion = openai_client.completions.create(
            model="demo", prompt="17+25=", n=4, seed=9, temperature=2, top_p=1, max_tokens=12
        )
        return [choice.text for choice in completion.choices]

    assert generate() == generate()
    assert len(set(generate())) > 1


def test_openai_client_completion_stream_with_stop_and_echo(openai_client: openai.OpenAI) -> None:
    stream = openai_client.completions.create(
        model="demo", prompt="17+25=", echo=True, stop=" 1+", temperature=0, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == "17+25= 7+5=12"
    assert chunks[-1].finish_reason == "stop"


def test_openai_client_logprobs_are_returned(openai_client: openai.OpenAI) -> None:
    completion = openai_client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_completion_tokens=3, logprobs=True, top_logprobs=2
    )
    [choice] = completion.choices
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert "".join(token.token for token in tokens) == choice.message.content == "7+5"
    assert all(token.top_logprobs[0].token == token.token and len(token.top_logprobs) == 2 for token in tokens)
    old = openai_client.completions.create(model="demo", prompt="17+25=", temperature=0, max_tokens=3, logprobs=1)
    assert old.choices[0].logprobs is not None
    assert len(old.choices[0].logprobs.tokens or []) == 3


class Answer(pydantic.BaseModel):
    result: int
    even: bool


def test_openai_client_parses_structured_output(openai_client: openai.OpenAI) -> None:
    completion = openai_client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Answer, max_tokens=300, temperature=1.5, seed=1
    )
    assert isinstance(completion.choices[0].message.parsed, Answer)


def test_openai_client_raises_its_own_errors(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="other", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as raised:
        openai_client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=-2)
    assert raised.value.param == "max_tokens"


def test_triton_client_reads_readiness_and_metadata(triton_client: triton.InferenceServerClient) -> None:
    assert triton_client.is_server_live()
    assert triton_client.is_server_ready()
    assert triton_client.is_model_ready("demo")
    assert triton_client.is_model_ready("demo", "1")
    assert triton_client.get_server_metadata()["name"] == "kserve-llm"
    assert triton_client.get_model_metadata("demo")["inputs"][0]["name"] == "text_input"


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_infers_with_binary_and_json_tensors(
    triton_client: triton.InferenceServerClient, binary: bool
) -> None:
    prompts = numpy.array([b"17+25=", b"60-91="], dtype=numpy.object_)
    tensor = triton.InferInput("text_input", [2], "BYTES")
    tensor.set_data_from_numpy(prompts, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("text_output", "completion_tokens")]
    result = triton_client.infer("demo", [tensor], outputs=outputs, request_id="7", parameters={"max_tokens": 40})
    assert result.get_response()["id"] == "7"
    texts = [text.decode() if isinstance(text, bytes) else text for text in result.as_numpy("text_output")]
    assert texts[0] == f" {ANSWER}"
    assert result.as_numpy("completion_tokens").tolist()[0] == 19


def test_triton_client_raises_the_servers_error(triton_client: triton.InferenceServerClient) -> None:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(numpy.array([b"1"], dtype=numpy.object_))
    with pytest.raises(triton.InferenceServerException, match="max_tokens: input should be greater"):
        triton_client.infer("demo", [tensor], parameters={"max_tokens": -2})
