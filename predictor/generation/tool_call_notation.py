"""How models write tool calls, as far as grammars need it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolCallNotation:
    """How a model writes calls whose arguments are JSON, as `opening`, calls with `separator` between, `closing`.

    A call is `begin`, the name, `middle`, the arguments, `end`.
    """

    trigger: str
    """Beginning of `opening` and `begin` together, by which calls differ from text."""
    begin: str
    middle: str
    end: str
    separator: str = "\n"
    opening: str = ""
    closing: str = ""
