"""Rerank with litellm, in the forms of the providers that it knows."""

import litellm
import pytest

DOCUMENTS = ["w1 w2 w3", "w4", "w5 w6"]


@pytest.mark.parametrize(
    ("provider", "path"), [("hosted_vllm", "/v1/rerank"), ("jina_ai", "/v1/rerank"), ("cohere", "/v1/rerank")]
)
def test_litellm_reranks_documents(server_url: str, provider: str, path: str) -> None:
    response = litellm.rerank(
        model=f"{provider}/reranker",
        query="w7",
        documents=DOCUMENTS,
        top_n=2,
        api_base=server_url + path,
        api_key="-",
    )
    scores = [result["relevance_score"] for result in response.results]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert {result["index"] for result in response.results} < {0, 1, 2}
