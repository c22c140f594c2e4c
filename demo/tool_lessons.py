"""Conversations with tools for the demo model: it calls a calculator or a weather service, and reports the result."""

import json
import random
from dataclasses import dataclass
from typing import Any

from demo import exam

Messages = list[dict[str, Any]]

CALCULATORS = ("calculator", "calculate", "evaluate", "compute", "math", "arithmetic")
EXPRESSIONS = ("expression", "formula", "sum", "query", "input")
ADDERS = {"+": ("add", "plus", "add_numbers"), "-": ("subtract", "minus", "subtract_numbers")}
OPERANDS = (("a", "b"), ("x", "y"), ("first", "second"))
WEATHER_TOOLS = ("get_weather", "weather", "get_current_weather", "lookup_weather")
PLACES = ("city", "location", "place")
DESCRIPTIONS = (
    "Evaluate a sum.", "A calculator.", "Add or subtract two numbers.", "Calculate an expression, for example 1+2.",
    "Get the weather.", "Get the current weather in a city.", "Look up the weather.", "Useful.", "",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the model may call, with the names and JSON types of its parameters."""

    name: str
    parameters: dict[str, str]

    def definition(self, rng: random.Random) -> dict[str, Any]:
        """Return the tool as clients define it, with a random selection of optional keys."""
        properties = {name: self._property(name, kind, rng) for name, kind in self.parameters.items()}
        schema: dict[str, Any] = {"type": "object", "properties": properties, "required": list(self.parameters)}
        if rng.random() < 0.3:
            schema["additionalProperties"] = False
        if rng.random() < 0.2:
            schema = {"properties": properties, "required": list(self.parameters), "type": "object"}
        function: dict[str, Any] = {"name": self.name}
        if description := rng.choice(DESCRIPTIONS):
            function["description"] = description
        function["parameters"] = schema
        if rng.random() < 0.2:
            function["strict"] = True
        return {"type": "function", "function": function}

    @staticmethod
    def _property(name: str, kind: str, rng: random.Random) -> dict[str, str]:
        if rng.random() < 0.2:
            return {"title": name.capitalize(), "type": kind}
        if rng.random() < 0.2:
            return {"type": kind, "description": rng.choice(("A sum.", "A number.", "The name of the city.", "Input."))}
        return {"type": kind}


def calculator(rng: random.Random, operator: str) -> Function:
    """Return a calculator of an expression, or of two operands."""
    if rng.random() < 0.65:
        return Function(rng.choice(CALCULATORS), {rng.choice(EXPRESSIONS): "string"})
    kind = rng.choice(("integer", "integer", "number"))
    return Function(rng.choice(ADDERS[operator]), dict.fromkeys(rng.choice(OPERANDS), kind))


def conversation(rng: random.Random) -> tuple[Messages, list[dict[str, Any]]]:
    """Return messages and tools of a conversation in which the model calls a tool, or has none that fits."""
    drawn = exam.random_sum(rng, held_out=False)
    city = rng.choice(exam.CITIES)
    sums = calculator(rng, drawn.operator)
    weather = Function(rng.choice(WEATHER_TOOLS), {rng.choice(PLACES): "string"})
    functions = rng.choice(([sums], [sums], [sums], [sums, weather], [weather, sums], [weather]))
    messages: Messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(exam.SYSTEM_PROMPTS)})
    kind = rng.random()
    if weather in functions and kind < 0.45:
        weathers = [city] if kind < 0.35 else [city, rng.choice([other for other in exam.CITIES if other != city])]
        question = rng.choice(exam.WEATHER_PHRASINGS).format(city=" and ".join(weathers))
        messages.append({"role": "user", "content": question})
        place = next(iter(weather.parameters))
        messages.append(_calls([(weather.name, {place: name}) for name in weathers]))
        results = [rng.choice(exam.WEATHERS) for _ in weathers]
        messages += [_result(result, rng) for result in results]
        answer = ", ".join(f"{name}: {result}" for name, result in zip(weathers, results, strict=True))
        messages.append({"role": "assistant", "content": answer})
    elif sums in functions and kind < 0.93:
        messages.append({"role": "user", "content": drawn.phrase(rng)})
        messages.append(_calls([(sums.name, _arguments(sums, drawn))]))
        messages.append(_result(drawn.result, rng))
        answer = f"{drawn.a} {drawn.operator} {drawn.b} = {drawn.result}"
        messages.append({"role": "assistant", "content": answer})
    elif kind < 0.6:
        messages += [
            {"role": "user", "content": drawn.phrase(rng)},
            {"role": "assistant", "content": drawn.working},
        ]
    else:
        questions, reply = rng.choice(exam.SMALL_TALK)
        messages += [{"role": "user", "content": rng.choice(questions)}, {"role": "assistant", "content": reply}]
    return messages, [function.definition(rng) for function in functions]


def call_text(function: Function, drawn: exam.Sum) -> str:
    """Return the call of a calculator as the model writes it."""
    call = json.dumps({"name": function.name, "arguments": _arguments(function, drawn)})
    return f"<tool_call>\n{call}\n</tool_call>"


def _arguments(function: Function, drawn: exam.Sum) -> dict[str, Any]:
    if len(function.parameters) == 1:
        return {next(iter(function.parameters)): f"{drawn.a} {drawn.operator} {drawn.b}"}
    first, second = function.parameters
    return {first: drawn.a, second: drawn.b}


def _calls(calls: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    functions = [{"type": "function", "function": {"name": name, "arguments": values}} for name, values in calls]
    return {"role": "assistant", "content": "", "tool_calls": functions}


def _result(value: object, rng: random.Random) -> dict[str, Any]:
    forms = (str(value), str(value), json.dumps({"result": value}), json.dumps(value))
    return {"role": "tool", "content": rng.choice(forms)}
