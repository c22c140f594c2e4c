"""Refuse numbers in JSON schemas that llguidance does not compute exactly.

It rounds large ones, so that the text would violate the schema, and some overflow its stack, which ends the process.
"""

from decimal import Decimal
from typing import Any

from predictor.errors import InvalidRequest

MAX_NUMBER = 2**53
"""Largest absolute value; larger integers have no exact floating-point number."""

_MAX_EXPONENT = 22
"""Largest power of ten that is exact as a floating-point number; digits times it are rounded once only."""

_LIMITS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_VALUES = frozenset({"const", "enum"})
_ANNOTATIONS = frozenset({"default", "examples", "example"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def check(schema: Any) -> None:
    """Check the limits and the values of a JSON schema.

    Raises:
        InvalidRequest: a number is too large or has too many digits; the message has its keyword.
    """
    if isinstance(schema, list):
        for item in schema:
            check(item)
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in _VALUES or keyword in _LIMITS:
            _check_value(keyword, value)
        elif keyword in _NAMED_SCHEMAS and isinstance(value, dict):
            for named in value.values():
                check(named)
        elif keyword not in _ANNOTATIONS:
            check(value)


def _check_value(keyword: str, value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_value(keyword, item)
    elif isinstance(value, int | float) and not _is_exact(value):
        raise InvalidRequest(
            f"The JSON schema is not supported: {keyword} has a number with too many digits. Use at most 15, and an "
            "exponent up to 22."
        )


def _is_exact(number: float) -> bool:
    if abs(number) > MAX_NUMBER or isinstance(number, int):
        return abs(number) <= MAX_NUMBER
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    return int("".join(map(str, digits))) <= MAX_NUMBER and abs(int(exponent)) <= _MAX_EXPONENT
