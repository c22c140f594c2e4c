"""Embeddings with every library that computes them; the server's model gives 32 dimensions."""

import litellm
import numpy
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

TEXTS = ["w1 w2 w3", "w4", "w5 w6"]


@pytest.fixture
def expected(openai_url: str) -> list[list[float]]:
    with openai.OpenAI(base_url=openai_url, api_key="-") as client:
        data = client.embeddings.create(model="embedder", input=TEXTS, encoding_format="float").data
    return [item.embedding for item in data]


def test_langchain_embeds_texts_as_the_sdk(openai_url: str, expected: list[list[float]]) -> None:
    # By default it sends the token ids of OpenAI's tokenizer.
    embeddings = OpenAIEmbeddings(model="embedder", base_url=openai_url, api_key="-", check_embedding_ctx_length=False)
    numpy.testing.assert_allclose(embeddings.embed_documents(TEXTS), expected, atol=1e-5)
    numpy.testing.assert_allclose(embeddings.embed_query(TEXTS[1]), expected[1], atol=1e-5)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_embeds_texts_as_the_sdk(openai_url: str, expected: list[list[float]], provider: str) -> None:
    response = litellm.embedding(model=f"{provider}/embedder", input=TEXTS, api_base=openai_url, api_key="-")
    numpy.testing.assert_allclose([item["embedding"] for item in response.data], expected, atol=1e-5)


def test_sdk_gets_fewer_dimensions(openai_url: str, expected: list[list[float]]) -> None:
    with openai.OpenAI(base_url=openai_url, api_key="-") as client:
        response = client.embeddings.create(model="embedder", input=TEXTS[0], dimensions=8)
    shortened = numpy.array(expected[0][:8])
    numpy.testing.assert_allclose(response.data[0].embedding, shortened / numpy.linalg.norm(shortened), atol=1e-5)
    assert response.usage.prompt_tokens == 5
