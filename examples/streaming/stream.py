"""Print an answer while it is generated, and stop early."""

import os

from openai import OpenAI

server = os.environ.get("SERVER", "http://127.0.0.1:8080")
client = OpenAI(base_url=f"{server}/v1", api_key=os.environ.get("API_KEY", "none"))
model = client.models.list().data[0].id
with client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Who are you?"}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
) as stream:
    # Leaving this block ends the generation on the server, at its next step.
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.completion_tokens} tokens")
