"""Validators and types of request fields that several protocols share."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

ReasoningEffort = Annotated[str, Field(pattern="^[a-z]{0,32}$")]
"""Of chat templates that have such a variable; each has its own values."""

Prompt = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
)
"""A text, or token ids."""


def reject(reason: str, *accepted: object) -> BeforeValidator:
    """Return a validator of a field of which only the accepted values are supported."""

    def check(value: object) -> object:
        if value not in accepted:
            raise PydanticCustomError("unsupported", reason)
        return value

    return BeforeValidator(check)


def one_issue(expected: str, type_: Any) -> WrapValidator:
    """Return a validator that reports one issue instead of one per type that the value may have."""

    def check(value: object, validate: Callable[[object], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("choice", expected) from None

    return WrapValidator(check, type_)


def wrap_string(value: object) -> object:
    """Return a string as a list of one string, and other values unchanged."""
    return [value] if isinstance(value, str) else value


def wrap_prompt(value: object) -> object:
    """Return one text, or one list of token ids, as a list of one; and other values unchanged."""
    is_single = isinstance(value, str) or (isinstance(value, list) and isinstance(next(iter(value), None), int))
    return [value] if is_single else value


def wrap_text(content: object) -> object:
    """Return a string as a list of one part of type text, and other values unchanged."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def reasoning_fields(text: str) -> dict[str, str]:
    """Return the fields of a message with its reasoning: chat templates and clients read the one or the other."""
    return {"reasoning_content": text, "reasoning": text}
