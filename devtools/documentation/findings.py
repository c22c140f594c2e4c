"""The page of preflight's findings, from the source of its checks."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from devtools.documentation.messages import text_of
from devtools.documentation.tables import table
from devtools.paths import ROOT

PREFLIGHT = ROOT / "preflight"
MODULES = (*sorted((PREFLIGHT / "checks").glob("[a-z]*.py")), PREFLIGHT / "cluster" / "checks.py")
TEXT = """
`kserve-llm check OVERLAY` and `python -m preflight OVERLAY` print one line for each finding. An error does not work or
is not safe; a warning costs time or money, or marks what was not checked. Words in UPPER CASE stand for values of the
overlay. The last column is what reports the problem without preflight, in most cases after the overlay was applied.
"""


@dataclass(frozen=True)
class Finding:
    """A finding as the source has it."""

    problem: str
    remedy: str
    source: str
    severity: str


@dataclass(frozen=True)
class _Wrapper:
    """How a caller turns the problems of a function into findings."""

    prefix: str = ""
    source: str = ""
    severity: str = "error"


def page() -> str:
    """Return the findings, with what to do, by subject."""
    parts = ["# Findings of preflight", TEXT.strip().replace("\n", " ")]
    for module in MODULES:
        if found := sorted(set(of_module(module)), key=lambda finding: finding.problem.lower()):
            docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
            subject = re.sub(r"^(Check|Validate) |(:|\.|, (and|which)\b).*$", "", docstring.partition("\n")[0])
            rows = [(finding.severity, finding.problem, finding.remedy, finding.source) for finding in found]
            parts += [
                f"## {subject[:1].upper()}{subject[1:]}",
                table(("Severity", "Problem", "What to do", "Source"), rows),
            ]
    return "\n\n".join(parts)


def of_module(module: Path) -> Iterator[Finding]:
    """Yield the findings of a module of checks; those whose whole text comes from elsewhere are left out."""
    tree = _with_constants(ast.parse(module.read_text()))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    wrappers = {name: wrapper for function in functions for name, wrapper in _wrappers(function)}
    for function in functions:
        assigned = _assigned(function)
        for node in ast.walk(function):
            match node:
                case ast.Call(func=ast.Name(id="Finding"), args=[_, problem, remedy, *rest]):
                    source, severity = _source_and_severity(rest)
                    yield from _finding(problem, remedy, assigned, _Wrapper("", source, severity))
                case ast.Yield(value=ast.Tuple(elts=[problem, remedy, *rest])):
                    wrapper = wrappers.get(function.name, _Wrapper())
                    own = text_of(rest[0]) if rest else None
                    yield from _finding(problem, remedy, assigned, replace(wrapper, source=own or wrapper.source))


def _with_constants(tree: ast.Module) -> ast.Module:
    """Replace the names of a module's constants by their texts."""
    constants = {
        name.id: value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(value := node.value, ast.Constant)
        for name in node.targets
        if isinstance(name, ast.Name) and isinstance(value.value, str)
    }

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return constants.get(node.id, node) if isinstance(node.ctx, ast.Load) else node

    return Replace().visit(tree)  # type: ignore[no-any-return]


def _finding(
    problem: ast.expr, remedy: ast.expr, assigned: dict[str, ast.expr], wrapper: _Wrapper
) -> Iterator[Finding]:
    texts = [text_of(assigned.get(node.id, node) if isinstance(node, ast.Name) else node) for node in (problem, remedy)]
    if texts[0] and texts[1] and "PROBLEM" not in texts[0]:
        yield Finding(wrapper.prefix + texts[0], texts[1], wrapper.source, wrapper.severity)


def _source_and_severity(arguments: list[ast.expr]) -> tuple[str, str]:
    """Return the last arguments of a finding; an error unless it says otherwise."""
    texts = [text_of(argument) or "" for argument in arguments]
    return texts[0] if texts else "", texts[1] if len(texts) > 1 else "error"


def _assigned(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """Return the values of a function's variables."""
    return {
        target.id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _wrappers(function: ast.FunctionDef) -> Iterator[tuple[str, _Wrapper]]:
    """Yield the functions whose problems a function turns into findings."""
    assigned = _assigned(function)
    for loop in ast.walk(function):
        if not isinstance(loop, ast.For):
            continue
        for node in ast.walk(loop):
            match node:
                case ast.Call(func=ast.Name(id="Finding"), args=[_, problem, _, *rest]):
                    source, severity = _source_and_severity(rest)
                    prefix = (text_of(problem) or "").partition("PROBLEM")[0]
                    for name in _names(loop.iter, assigned):
                        yield name, _Wrapper(prefix, source, severity)


def _names(node: ast.expr, assigned: dict[str, ast.expr]) -> set[str]:
    """Return the names in an expression, and in the values of its variables."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    inner = [assigned[name] for name in names if name in assigned and assigned[name] is not node]
    return names | {part.id for value in inner for part in ast.walk(value) if isinstance(part, ast.Name)}
