"""Parse tool calls that are written as calls of Python functions."""

import ast
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from predictor.generation.incremental_text import Malformed


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and the arguments of each call in `[f(a=1), g(b="x")]`; also without the brackets.

    Raises:
        Malformed: the text is anything else.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = _JsonConstants().visit(ast.parse(text.strip()))
        return [_call(node) for statement in tree.body for node in _nodes(statement)]
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise Malformed from error


def _nodes(statement: ast.stmt) -> list[ast.expr]:
    if not isinstance(statement, ast.Expr):
        raise Malformed
    value = statement.value
    return value.elts if isinstance(value, ast.List | ast.Tuple) else [value]


class _JsonConstants(ast.NodeTransformer):
    """Replaces JSON's constants, which models mix with Python's."""

    _VALUES: ClassVar[Mapping[str, bool | None]] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Return the constant of this name, else the name."""
        return ast.Constant(self._VALUES[node.id]) if node.id in self._VALUES else node


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call):
        raise Malformed
    name = ast.unparse(node.func)
    if name == "print" and len(node.args) == 1:
        return _call(node.args[0])
    if node.args:
        raise Malformed
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise Malformed
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return name, arguments
