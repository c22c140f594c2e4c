"""How a model writes a tool call around its name and its arguments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CallEnvelope:
    """Texts around the names and the JSON arguments of tool calls; markers in them may be special tokens.

    One call is `begin + before_name + NAME + before_arguments + ARGUMENTS + after_arguments + end`. Between
    `after_arguments` of a call and `before_name` of the next one is `between_calls`.
    """

    before_name: str
    before_arguments: str
    after_arguments: str = ""
    begin: str = ""
    end: str = ""
    between_calls: str = ""
    marker: str = ""
    """Beginning of the first call, by which it differs from text; "" if a call is the whole message instead."""
    excluded: tuple[str, ...] = ()
    """Other texts that begin a call, of which no grammar knows the rest."""

    def to_schema(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON schema of a call without markers, from that of its arguments."""
        key = self.before_arguments.split('"')[2]
        properties = {"name": {"const": name}, key: _moved(arguments, f"#/properties/{key}")}
        return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _moved(schema: Any, place: str) -> Any:
    """Return a schema with its references changed to those from its place in another one."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
