"""Get an answer as an object of a class."""

import os

from openai import OpenAI
from pydantic import BaseModel


class Sum(BaseModel):
    """What the model is to fill in."""

    working: str
    result: int


server = os.environ.get("SERVER", "http://127.0.0.1:8080")
client = OpenAI(base_url=f"{server}/v1", api_key=os.environ.get("API_KEY", "none"))
model = client.models.list().data[0].id
completion = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "What is 17 + 25? Answer as JSON."}],
    response_format=Sum,
    temperature=0,
)
print(completion.choices[0].message.parsed)
