"""The embedding model of examples/rag, served."""

from pathlib import Path

import numpy

from devtools import word_embedder
from devtools.paths import ROOT
from tests.predictor import servers

PASSAGES = (ROOT / "examples/rag/passages.txt").read_text().splitlines()
QUESTIONS = {
    "Who identifies a caller?": "An API key",
    "who VERIFIES checksums?": "The storage initializer",
    "Which CACHE keeps keys and values?": "The KV cache",
    "the traffic of a canary": "A canary",
}
"""Questions, and how the passage begins that has their words."""


def test_distinctive_words_are_those_in_less_than_half_of_the_texts() -> None:
    texts = ["The cat sat.", "The dog, the Dog!", "A dog", "Mice"]
    assert word_embedder.distinctive_words(texts) == ["a", "cat", "mice", "sat"]


def test_word_embedder_is_nearest_to_the_passage_with_the_same_words(tmp_path: Path) -> None:
    directory = word_embedder.make(tmp_path, PASSAGES)
    with servers.in_process("--model_dir", str(directory), model_name="word-embedder") as server:
        body = {"model": "word-embedder", "input": [*PASSAGES, *QUESTIONS]}
        response = server.client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    vectors = numpy.array([item["embedding"] for item in response.json()["data"]])
    scores = vectors[len(PASSAGES) :] @ vectors[: len(PASSAGES)].T
    for best, beginning in zip(scores.argmax(axis=1), QUESTIONS.values(), strict=True):
        assert PASSAGES[best].startswith(beginning)
