"""Run an agent of LangChain that calls a function."""

import os

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def calculator(expression: str) -> str:
    """Evaluate a sum."""
    first, _, second = expression.partition("+")
    return str(int(first) + int(second))


server = os.environ.get("SERVER", "http://127.0.0.1:8080")
model = ChatOpenAI(
    model=os.environ.get("MODEL", "arithmetic"),
    base_url=f"{server}/v1",
    api_key=os.environ.get("API_KEY", "none"),
    temperature=0,
)
agent = create_agent(model, [calculator])
for message in agent.invoke({"messages": [{"role": "user", "content": "What is 17 + 25?"}]})["messages"]:
    for call in getattr(message, "tool_calls", ()):
        print(f"{message.type}: {call['name']}({call['args']})")
    if message.text:
        print(f"{message.type}: {message.text}")
