"""Analyse the source of chat templates: which variables they read, and which texts they write or look for."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import jinja2
import jinja2.meta
from jinja2 import nodes

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
"""Tags that mark the assistant's text for training, an extension of transformers that Jinja cannot parse."""


class TemplateAnalysis(NamedTuple):
    """What one or several templates of a model read and write."""

    variables: frozenset[str]
    written: str
    """Texts that may be written, separated by NUL."""
    read: str
    """Texts that messages are compared with, separated by NUL."""


def analyse(sources: Iterable[str]) -> TemplateAnalysis:
    """Analyse templates together.

    Raises:
        jinja2.TemplateSyntaxError: a template cannot be parsed.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701
    variables: set[str] = set()
    written: set[str] = set()
    read: set[str] = set()
    for source in sources:
        tree = environment.parse(_GENERATION_TAG.sub("", source))
        variables |= jinja2.meta.find_undeclared_variables(tree)
        written |= {data.data for data in tree.find_all(nodes.TemplateData)} | _strings(tree)
        read |= _strings_read(tree)
    return TemplateAnalysis(frozenset(variables), "\0".join(written), "\0".join(read))


def _strings_read(tree: nodes.Template) -> set[str]:
    """Return the strings that messages are compared with, as in `'</think>' in content` or `content.split('</think>')`.

    Macros and functions, unlike methods and filters, may write their arguments.
    """
    operands: list[nodes.Node] = [*tree.find_all(nodes.Compare)]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr):
            operands += call.args
    for filter_ in tree.find_all(nodes.Filter):
        operands += filter_.args
    # `find_all` finds what is inside of a node only.
    return _strings(nodes.List(operands))


def _strings(tree: nodes.Node) -> set[str]:
    return {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
