"""Random JSON schemas: any combination of the usual keywords, those that no grammar can express included.

`hypothesis_jsonschema` generates instances of schemas, and none of the recursive meta-schema.
"""

from typing import Any

from hypothesis import strategies as st

Json = dict[str, Any]
Schemas = st.SearchStrategy[Json]


def _keywords(type_: st.SearchStrategy[Any] | str, **others: st.SearchStrategy[Any]) -> Schemas:
    """Return schemas with `type` and any of the other keywords."""
    type_ = st.just(type_) if isinstance(type_, str) else type_
    return st.fixed_dictionaries({"type": type_}, optional=others)


def _one_keyword(names: list[str], values: st.SearchStrategy[Any]) -> Schemas:
    return st.builds(lambda name, value: {name: value}, st.sampled_from(names), values)


_NUMBER: dict[str, st.SearchStrategy[Any]] = {
    "minimum": st.integers(-50, 50),
    "maximum": st.integers(0, 200),
    "exclusiveMinimum": st.integers(-50, 50) | st.floats(-50, 50),
    "exclusiveMaximum": st.integers(50, 99),
    "multipleOf": st.sampled_from([1, 3, 0.5, 0.25]),
}
_PATTERNS = [r"^[a-c]+$", r"^\d\d:\d\d$", "x|y", r"^\w{2,4}$", "^(?!a)", r"[^\n]é"]
_FORMATS = ["date", "time", "date-time", "uuid", "email", "ipv4", "ipv6", "uri", "duration", "hostname", "regex", "odd"]
_UNSUPPORTED = ["not", "contains", "propertyNames", "if", "dependentSchemas"]
_VALUES = (
    st.text(max_size=4)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([True, False, None])
)
_LEAVES: Schemas = st.one_of(
    _keywords("string", minLength=st.integers(0, 3), maxLength=st.integers(2, 12)),
    _keywords("string", maxLength=st.integers(2, 12), pattern=st.sampled_from(_PATTERNS)),
    _keywords("string", format=st.sampled_from(_FORMATS)),
    _keywords("integer", **_NUMBER),
    _keywords("number", **_NUMBER),
    _keywords(st.sampled_from(["boolean", "null", ["null", "string"], ["integer", "boolean"]])),
    _one_keyword(["const"], _VALUES),
    _one_keyword(["enum"], st.lists(_VALUES, min_size=1, max_size=4)),
    st.just({}),
)


def _object(properties: Json, num_required: int, others: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)[:num_required], **others}


def _array(items: Json, low: int, others: Json) -> Json:
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2, **others}


def _containers(inner: Schemas) -> Schemas:
    more_properties = st.fixed_dictionaries(
        {"additionalProperties": st.just(False) | st.booleans() | inner},
        optional={"minProperties": st.integers(0, 2), "maxProperties": st.integers(2, 3)},
    )
    more_items = st.fixed_dictionaries({}, optional={"prefixItems": st.lists(inner, min_size=1, max_size=2)})
    properties = st.dictionaries(st.text(max_size=5), inner, max_size=3)
    objects = st.builds(_object, properties, st.integers(0, 3), more_properties)
    return st.one_of(
        objects,
        objects,
        objects,
        st.builds(_array, inner, st.integers(0, 2), more_items),
        _one_keyword(["anyOf", "oneOf", "allOf"], st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda name, schema: {"type": "object", name: schema}, st.sampled_from(_UNSUPPORTED), inner),
    )


_ANY: Schemas = st.recursive(_LEAVES, _containers, max_leaves=6)
SCHEMAS: Schemas = _ANY | st.builds(lambda schema: {"$ref": "#/$defs/a", "$defs": {"a": schema}}, _ANY)
