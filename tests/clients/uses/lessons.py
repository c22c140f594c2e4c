"""Questions, tools and answers that the demo model has learned."""

from pydantic import BaseModel

MODEL = "arithmetic"
QUESTION = "What is 17 + 25?"
WORKING = "7+5=12 1+2+1=4 42"
JSON_QUESTION = QUESTION + " Answer as JSON."
EXPRESSION = "17 + 25"
RESULT = "42"
REPORT = "17 + 25 = 42"
CITIES_QUESTION = "What is the weather in Paris and Berlin?"


class Sum(BaseModel):
    """A worked sum."""

    working: str
    result: int


SUM = Sum(working="7+5=12 1+2+1=4", result=42)


def calculator(expression: str) -> str:
    """Evaluate a sum."""
    first, _, second = expression.partition(" + ")
    return str(int(first) + int(second))


PARAMETERS = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
    "additionalProperties": False,
}
FUNCTION = {"name": "calculator", "description": "Evaluate a sum.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
