"""How calls are written."""

from predictor.generation.call_envelope import HERMES, MISTRAL, MISTRAL_LIST


def test_write_puts_calls_into_the_notation_of_the_model() -> None:
    calls = [("add", '{"a": 1}'), ("now", "{}")]
    assert HERMES.write(calls) == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    )
    assert MISTRAL.write(calls) == '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]now[ARGS]{}'
    assert MISTRAL_LIST.write(calls) == (
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]'
    )
