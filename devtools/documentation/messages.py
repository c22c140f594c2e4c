"""Messages in source code: strings and f-strings, with an UPPER CASE word for each value."""

import ast
import html


def text_of(node: ast.expr) -> str | None:
    """Return the text of an expression as Markdown; None if it is neither a string nor made of strings."""
    match node:
        case ast.Constant(value=str() as value):
            return _escape(value)
        case ast.JoinedStr(values=values):
            return "".join(map(_part, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            parts = text_of(left), text_of(right)
            return None if None in parts else "".join(part or "" for part in parts)
        case ast.IfExp(body=body, orelse=other):
            texts = [text for text in (text_of(body), text_of(other)) if text]
            return " or ".join(texts) or None
    return None


def _escape(text: str) -> str:
    """Escape HTML outside of code."""
    parts = text.split("`")
    return "`".join(part if number % 2 else html.escape(part, quote=False) for number, part in enumerate(parts))


def _part(node: ast.expr) -> str:
    return _value(node.value) if isinstance(node, ast.FormattedValue) else text_of(node) or ""


def _value(node: ast.expr) -> str:
    """Return the word for a value: a name in upper case, or the alternatives of a condition."""
    match node:
        case ast.Constant(value=str() as text):
            return _escape(text)
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=str() as name)):
            return name.strip("_").upper()
        case ast.IfExp(body=ast.Constant(value=str() as one), orelse=ast.Constant(value=str() as other)):
            return f"{one}/{other}" if one and other else one or other
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str() as name), *_]):
            return name.upper()
        case ast.Call(args=[first, *_]):
            return _value(first)
        case ast.GeneratorExp(elt=inner) | ast.Subscript(value=inner) | ast.Await(value=inner):
            return _value(inner)
        case ast.BoolOp(values=[first, *_]):
            return _value(first)
    return "VALUE"
