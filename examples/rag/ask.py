"""Answer a question from the passages whose embeddings are nearest to its own: `ask.py QUESTION`."""

import os
import sys
from pathlib import Path

import numpy
from numpy.typing import NDArray
from openai import OpenAI

NEAREST = 2
key = os.environ.get("API_KEY", "none")
generator = OpenAI(base_url=f"{os.environ.get('SERVER', 'http://127.0.0.1:8080')}/v1", api_key=key)
embedder = OpenAI(base_url=f"{os.environ.get('EMBEDDER', 'http://127.0.0.1:8083')}/v1", api_key=key)


def embed(texts: list[str]) -> NDArray[numpy.float64]:
    """Return one normalized vector for each text, [n, d]."""
    response = embedder.embeddings.create(model=embedder.models.list().data[0].id, input=texts)
    return numpy.array([item.embedding for item in response.data])


question = sys.argv[1]
passages = Path(__file__).with_name("passages.txt").read_text().splitlines()
scores = embed(passages) @ embed([question])[0]
nearest = [passages[index] for index in scores.argsort()[::-1][:NEAREST]]
for passage in nearest:
    print(f"- {passage}")
instructions = "\n".join(["Answer from these passages.", *nearest])
completion = generator.chat.completions.create(
    model=generator.models.list().data[0].id,
    messages=[{"role": "system", "content": instructions}, {"role": "user", "content": question}],
    temperature=0,
    max_tokens=128,
)
print(completion.choices[0].message.content)
