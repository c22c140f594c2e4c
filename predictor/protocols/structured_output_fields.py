"""Request fields for structured output, in OpenAI's words and in vLLM's, the same in every protocol."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from predictor.errors import InvalidRequest
from predictor.protocols.field_tables import REFUSED_STRUCTURED_OUTPUTS
from predictor.protocols.json_object import JSONObject
from predictor.types import GrammarKind, StructuredOutput

_ANY_OBJECT = json.dumps({"type": "object"})


def parse_json(value: object) -> object:
    """Return the object or list in a string of JSON: parameters of Open Inference are scalars."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


_Schema = Annotated[dict[str, Any], BeforeValidator(parse_json, dict[str, Any] | str)]
_Choices = Annotated[list[str], Field(min_length=1), BeforeValidator(parse_json, list[str] | str)]


class _JSONSchema(JSONObject):
    name: str | None = None
    description: str | None = None
    schema_: _Schema | None = Field(default=None, alias="schema")


class _ResponseFormat(JSONObject):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JSONSchema | None = None
    schema_: _Schema | None = Field(default=None, alias="schema", description="llama.cpp's, of json_object.")

    def to_json_schema(self) -> str | None:
        if self.type == "text":
            return None
        schema = self.schema_ or (self.json_schema and self.json_schema.schema_)
        return _ANY_OBJECT if schema is None else json.dumps(schema)


class _StructuredOutputs(JSONObject):
    refused = REFUSED_STRUCTURED_OUTPUTS

    json_: _Schema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None
    json_object: bool = False


class StructuredOutputFields(JSONObject):
    """OpenAI's `response_format`, vLLM's `structured_outputs`, and its older `guided_` fields; one at most."""

    response_format: Annotated[_ResponseFormat, BeforeValidator(parse_json, _ResponseFormat | str)] | None = Field(
        default=None, description="JSON, of a schema or of any kind."
    )
    structured_outputs: Annotated[_StructuredOutputs, BeforeValidator(parse_json, _StructuredOutputs | str)] | None = (
        Field(default=None, description="JSON schema, regular expression, list of choices or Lark grammar of the text.")
    )
    guided_json: _Schema | None = None
    guided_regex: str | None = None
    guided_choice: _Choices | None = None
    guided_grammar: str | None = None

    def structured_output(self) -> StructuredOutput | None:
        """Return what the text must follow; None if nothing.

        Raises:
            InvalidRequest: there is more than one.
        """
        constraints = {name: value for name, value in self._constraints().items() if value is not None}
        if len(constraints) > 1:
            names = " and ".join(constraints)
            raise InvalidRequest(f"Only one structured output is possible, not {names}. Send one of them.")
        return next(iter(constraints.values()), None)

    def _constraints(self) -> dict[str, StructuredOutput | None]:
        outputs = self.structured_outputs or _StructuredOutputs()
        response_format = self.response_format.to_json_schema() if self.response_format else None
        return {
            "response_format": _text(GrammarKind.JSON_SCHEMA, response_format),
            "structured_outputs.json_object": _text(
                GrammarKind.JSON_SCHEMA, _ANY_OBJECT if outputs.json_object else None
            ),
            "structured_outputs.json": _json(GrammarKind.JSON_SCHEMA, outputs.json_),
            "structured_outputs.regex": _text(GrammarKind.REGEX, outputs.regex),
            "structured_outputs.choice": _json(GrammarKind.CHOICE, outputs.choice),
            "structured_outputs.grammar": _text(GrammarKind.GRAMMAR, outputs.grammar),
            "guided_json": _json(GrammarKind.JSON_SCHEMA, self.guided_json),
            "guided_regex": _text(GrammarKind.REGEX, self.guided_regex),
            "guided_choice": _json(GrammarKind.CHOICE, self.guided_choice),
            "guided_grammar": _text(GrammarKind.GRAMMAR, self.guided_grammar),
        }


def json_schema_output(schema: dict[str, Any]) -> StructuredOutput:
    """Return the structured output of a JSON schema."""
    return StructuredOutput(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def _text(kind: GrammarKind, value: str | None) -> StructuredOutput | None:
    return None if value is None else StructuredOutput(kind, value)


def _json(kind: GrammarKind, value: object) -> StructuredOutput | None:
    return None if value is None else StructuredOutput(kind, json.dumps(value))
