"""Parse JSON bodies, derive JSON schemas of them, and format validation errors."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from predictor.errors import InvalidRequest

_SLICE = 128
"""Elements of a longer list are encoded by slices. Shorter ones may hold large elements, such as choices."""


def to_utf8(body: bytes) -> bytes:
    """Return a JSON body in UTF-8 without a byte-order mark.

    UTF-16 and UTF-32 are recognized as in RFC 4627, by the byte-order mark or the zeros of the first characters.

    Raises:
        InvalidRequest: it is empty, or its encoding is invalid.
    """
    if not body:
        raise InvalidRequest("The body is empty. Send JSON.")
    encoding = json.detect_encoding(body)
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not {error.encoding.upper()} ({error.reason} at byte {error.start}). Send JSON in UTF-8."
        ) from None
    return body if encoding == "utf-8" else text.encode()


def loads(body: bytes) -> Any:
    """Parse a JSON body.

    Raises:
        InvalidRequest: it is not JSON, or has a string that cannot be encoded as UTF-8.
    """
    body = to_utf8(body)
    try:
        content = json.loads(body)
        if b"\\u" in body:
            # An escape may be half of a surrogate pair, which fails wherever the text is encoded again.
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("The body has half of a surrogate pair in a string. Send whole characters.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not JSON ({error}).") from None
    except RecursionError:
        raise InvalidRequest("The body is not JSON (nested too deeply).") from None
    except ValueError:
        raise InvalidRequest("The body has a number of too many digits.") from None
    return content


def dump(value: Any) -> Iterator[str]:
    """Yield a value as JSON in pieces, so that other threads run in between: one call for a large value blocks them."""
    if isinstance(value, dict):
        for index, (name, item) in enumerate(value.items()):
            yield f"{',' if index else '{'}{_dumps(name)}:"
            yield from dump(item)
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > _SLICE:
        for begin in range(0, len(value), _SLICE):
            yield f"{',' if begin else '['}{_dumps(value[begin : begin + _SLICE])[1:-1]}"
        yield "]"
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield "," if index else "["
            yield from dump(item)
        yield "]"
    else:
        yield _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a request, with its definitions inlined so that any document can embed it."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(element) for element in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(definitions[node["$ref"].rpartition("/")[2]])
        # Titles are names of private classes.
        return {key: inline(value) for key, value in node.items() if key != "title"}

    return {key: inline(value) for key, value in schema.items() if key not in ("title", "description")}


def format_validation_error(error: ValidationError, *, prefix: str = "") -> str:
    """Return one line with all issues of a request body, each with its field's path after `prefix`."""
    issues = [(prefix + ".".join(map(str, issue["loc"])), issue) for issue in error.errors(include_url=False)]
    return "; ".join(f"{field or 'the body'}: {_message(issue)}" for field, issue in issues) + "."


def _message(issue: Mapping[str, Any]) -> str:
    if issue["type"] == "model_type":  # pydantic's message has the name of a private class
        return "input should be an object"
    message: str = issue["msg"]
    return message[0].lower() + message[1:]
