"""Validators shared by OpenAI's request models."""

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError


def reject(reason: str, *accepted: object) -> BeforeValidator:
    """Return a validator of an unsupported field that allows the accepted values only."""

    def check(value: object) -> object:
        if value not in accepted:
            raise PydanticCustomError("unsupported", reason)
        return value

    return BeforeValidator(check)
