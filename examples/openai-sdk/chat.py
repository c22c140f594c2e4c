"""Ask a question with OpenAI's SDK."""

import os

from openai import OpenAI

server = os.environ.get("SERVER", "http://127.0.0.1:8080")
client = OpenAI(base_url=f"{server}/v1", api_key=os.environ.get("API_KEY", "none"))
model = client.models.list().data[0].id
completion = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "What is 17 + 25?"}], temperature=0, max_tokens=64
)
print(completion.choices[0].message.content)
if completion.usage:
    print(completion.usage.total_tokens, "tokens")
