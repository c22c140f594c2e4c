"""Base class of the objects in request bodies: nulls, whole numbers, and fields that the models do not declare."""

from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from predictor.errors import InvalidRequest
from predictor.observability import request_record
from predictor.protocols.field_tables import HARMLESS, Refusals
from predictor.protocols.json_body import format_validation_error, to_utf8

ObjectT = TypeVar("ObjectT", bound="JSONObject")


def _complete_schema(schema: dict[str, Any], model: "type[JSONObject]") -> None:
    """Add to the JSON schema what the validators and `remove_extra_fields` do."""
    properties = schema.setdefault("properties", {})
    for name, field in properties.items():
        nullable = not field or any(option.get("type") == "null" for option in field.get("anyOf", [field]))
        if name not in schema.get("required", ()) and not nullable:
            properties[name] = {"anyOf": [field, {"type": "null"}]}
    for name, refusal in model.refused.items():
        properties.setdefault(name, {"enum": [None, *refusal.neutral], "description": f"Refused: {refusal.reason}."})
    for name in sorted(model.harmless):
        properties.setdefault(name, {"description": "Accepted without effect."})


class JSONObject(BaseModel):
    """An object in a request body.

    Null means absent, and 24.0 is the integer 24. Fields that a model does not declare stay in `model_extra` until
    `remove_extra_fields`.
    """

    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra=_complete_schema)

    harmless: ClassVar[frozenset[str]] = HARMLESS
    """Names of fields that are accepted without effect."""
    refused: ClassVar[Refusals] = {}
    """Fields that are refused, since ignoring them would change the answer."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return {name: field for name, field in value.items() if field is not None} if isinstance(value, dict) else value

    @field_validator("*", mode="before")
    @classmethod
    def _to_integer(cls, value: Any) -> Any:
        """Return a whole number as an integer, which is valid for fields of either type."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


def validate(model: type[ObjectT], content: Any, prefix: str = "") -> ObjectT:
    """Return parsed JSON as an object of `model`, without the fields that it does not declare.

    Args:
        model: of the object.
        content: any JSON value.
        prefix: put before every path in messages.

    Raises:
        InvalidRequest: a field is missing, wrong or refused; the message names it.
    """
    try:
        validated = model.model_validate(content)
    except ValidationError as error:
        raise _invalid(error, prefix) from None
    remove_extra_fields(validated, prefix)
    return validated


def validate_body(model: type[ObjectT], body: bytes) -> ObjectT:
    """Return a JSON body as an object of `model`, as `validate` does; faster than parsing it first.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong or refused; the message names it.
    """
    try:
        validated = model.model_validate_json(to_utf8(body))
    except ValidationError as error:
        raise _invalid(error) from None
    remove_extra_fields(validated)
    return validated


def _invalid(error: ValidationError, prefix: str = "") -> InvalidRequest:
    fields = [prefix + ".".join(map(str, issue["loc"])) for issue in error.errors(include_input=False)]
    field = fields[0] if len(fields) == 1 and fields[0] else None
    return InvalidRequest(format_validation_error(error, prefix=prefix), field)


def remove_extra_fields(request: JSONObject, prefix: str = "") -> None:
    """Remove all fields that the models do not declare; record the names of unknown ones as ignored.

    Args:
        request: a validated body.
        prefix: put before every path.

    Raises:
        InvalidRequest: a field has to be refused; the message names it.
    """
    record = request_record.current()
    for path, item in _objects(request, prefix):
        if not (others := item.model_extra):
            continue
        for name in others.keys() & item.refused.keys():
            if not item.refused[name].accepts(others[name]):
                raise InvalidRequest(f"{path}{name}: {item.refused[name].reason}.", path + name)
        unknown = others.keys() - item.refused.keys() - item.harmless
        record.add_ignored_fields(path + name for name in others if name in unknown)
        others.clear()


def _objects(item: JSONObject, path: str) -> Iterator[tuple[str, JSONObject]]:
    """Yield each object in `item`, and itself first, with the prefix of its fields' paths."""
    yield path, item
    for name, value in vars(item).items():
        if isinstance(value, JSONObject):
            yield from _objects(value, f"{path}{name}.")
        elif isinstance(value, list):
            for index, element in enumerate(value):
                if not isinstance(element, JSONObject):
                    break
                yield from _objects(element, f"{path}{name}.{index}.")
