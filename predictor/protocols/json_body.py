"""Read JSON bodies, describe them as JSON schemas, and report invalid fields."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from predictor.errors import InvalidRequest


def loads(body: bytes) -> Any:
    """What a JSON body says.

    Raises:
        InvalidRequest: it is not JSON, or holds text that no encoding can carry back.
    """
    try:
        content = json.loads(body)
        if b"\\u" in body:
            # An escape may be half of a surrogate pair, which fails wherever the text is encoded again.
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("The body has half of a surrogate pair in a string; send whole characters.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not JSON ({error}).") from None
    except RecursionError:
        raise InvalidRequest("The body is not JSON (nested too deeply).") from None
    except ValueError:
        raise InvalidRequest("The body has a number of too many digits.") from None
    return content


def schema(body: type[BaseModel]) -> dict[str, Any]:
    """A body's JSON schema with its definitions in place, so that it may stand anywhere in a larger document."""
    described = body.model_json_schema()
    definitions = described.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(element) for element in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(definitions[node["$ref"].rpartition("/")[2]])
        # Titles are the names of private classes.
        return {key: inline(value) for key, value in node.items() if key != "title"}

    return {key: inline(value) for key, value in described.items() if key not in ("title", "description")}


def sentence(error: ValidationError, *, prefix: str = "", known: Iterable[str] = ()) -> str:
    """Every issue of a validation error in one sentence, each with the field's path.

    Args:
        error: of a request's body.
        prefix: stands before every path.
        known: names to suggest where one is not known.
    """
    issues = [(prefix + ".".join(map(str, issue["loc"])), issue) for issue in error.errors(include_url=False)]
    unknown = [field for field, issue in issues if issue["type"] == "extra_forbidden"]
    wrong = [
        f"{field or 'the body'}: {_reason(issue)}" for field, issue in issues if issue["type"] != "extra_forbidden"
    ]
    if unknown:
        wrong.append(f"{', '.join(unknown)}: not known here; known are {', '.join(sorted(known))}")
    return "; ".join(wrong) + "."


def _reason(issue: Mapping[str, Any]) -> str:
    if issue["type"] == "model_type":  # whose own message names the class
        return "input should be an object"
    message: str = issue["msg"]
    return message[0].lower() + message[1:]
