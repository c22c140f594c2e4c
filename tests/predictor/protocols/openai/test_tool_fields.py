"""Tools, tool choices and deprecated functions of chat requests."""

from typing import Any

import pytest

from tests.predictor.protocols.openai.helpers import Json, chat, decoded_chat, rejected, template_messages


def tool(name: str, **function: Any) -> Json:
    return {"type": "function", "function": {"name": name, **function}}


def named(name: str) -> Json:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> Json:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(map(named, names))}}


A, B = tool("a", parameters={"type": "object"}), tool("b")


@pytest.mark.parametrize(
    ("choice", "offered", "required"),
    [
        (None, (A, B), False),
        ("auto", (A, B), False),
        ("none", (), False),
        ("required", (A, B), True),
        (named("b"), (B,), True),
        (allowed("auto", "b"), (B,), False),
        (allowed("required", "b", "a"), (A, B), True),
    ],
)
def test_decode_tool_choice_selects_tools_and_requires_calls(
    choice: Any, offered: tuple[Json, ...], required: bool
) -> None:
    prompt = decoded_chat(tools=[A, B], tool_choice=choice)
    assert (prompt.tools, prompt.requires_tool_call) == (offered, required)


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"tools": [A, B], "tool_choice": named("c")}, "tool_choice", "unknown tool 'c'. Use one of .*: a, b."),
        ({"tools": [A], "tool_choice": allowed("auto", "c")}, "tool_choice", "unknown tool 'c'"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": named("a")}, "tool_choice", "there are no tools"),
        ({"tools": [A], "tool_choice": "any"}, "tool_choice", 'expected "none", "auto", "required"'),
        ({"tools": [A], "tool_choice": {"type": "custom"}}, "tool_choice", "expected"),
        ({"tools": [A], "tool_choice": allowed("auto")}, "tool_choice", "expected"),
        ({"tools": [A], "functions": [A["function"]]}, "functions", "replaced by tools"),
        ({"functions": [A["function"]], "function_call": {"name": "c"}}, "function_call", "unknown tool 'c'"),
        ({"function_call": {"name": "a"}}, "function_call", "there are no functions"),
        ({"function_call": "required"}, "function_call", "expected"),
    ],
)
def test_decode_impossible_choice_raises_with_its_field(fields: Json, field: str, reason: str) -> None:
    error = rejected(chat, **fields)
    assert error.field == field
    with pytest.raises(type(error), match=f"^{field}: {reason}"):
        raise error


def test_decode_strict_tools_are_named_and_not_shown_to_the_template() -> None:
    prompt = decoded_chat(tools=[tool("a", strict=True), tool("b", strict=False), B, tool("c", strict=None)])
    assert prompt.strict_tools == {"a"}
    assert prompt.tools == (named("a"), named("b"), B, named("c"))


def test_decode_parallel_tool_calls_allows_one_or_several() -> None:
    assert decoded_chat(tools=[A]).parallel_tool_calls
    assert not decoded_chat(tools=[A], parallel_tool_calls=False).parallel_tool_calls
    assert decoded_chat(tools=[A], tool_choice="required").parallel_tool_calls


def test_decode_choice_of_a_tool_allows_one_call() -> None:
    assert not decoded_chat(tools=[A, B], tool_choice=named("a"), parallel_tool_calls=True).parallel_tool_calls


@pytest.mark.parametrize(
    ("choice", "offered", "required"),
    [(None, (A, B), False), ("auto", (A, B), False), ("none", (), False), ({"name": "b"}, (B,), True)],
)
def test_decode_deprecated_functions_are_tools_of_which_one_is_called(
    choice: Any, offered: tuple[Json, ...], required: bool
) -> None:
    fields = {"functions": [A["function"], B["function"]], "function_call": choice}
    assert chat(**fields).uses_functions
    prompt = decoded_chat(**fields)
    assert (prompt.tools, prompt.requires_tool_call, prompt.parallel_tool_calls) == (offered, required, False)


def test_chat_deprecated_function_messages_become_tool_messages() -> None:
    first, second = {"name": "a", "arguments": '{"x": 1}'}, {"name": "b", "arguments": "{}"}
    assert template_messages(
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "function_call": first},
        {"role": "function", "name": "a", "content": "1"},
        {"role": "assistant", "content": "", "function_call": second},
        {"role": "function", "name": "b", "content": None},
    ) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [_call("call00001", "a", {"x": 1})]},
        {"role": "tool", "name": "a", "content": "1", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "", "tool_calls": [_call("call00003", "b", {})]},
        {"role": "tool", "name": "b", "content": "", "tool_call_id": "call00003"},
    ]


def _call(id_: str, name: str, arguments: Json) -> Json:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_chat_reasoning_of_either_name_is_passed_as_both(field: str) -> None:
    [passed] = template_messages({"role": "assistant", "content": "4", field: "2 + 2"})
    assert passed == {"role": "assistant", "content": "4", "reasoning": "2 + 2", "reasoning_content": "2 + 2"}
