"""Names of torch in code that no test without a GPU runs. mypy does not follow torch's modules."""

import ast
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from devtools.paths import ROOT

FOLDERS = ["predictor", "benchmarks", "tests/predictor/devices"]


def names(tree: ast.AST) -> Iterator[list[str]]:
    """The attributes of every `torch.a.b.c`."""
    for node in ast.walk(tree):
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if attributes and isinstance(node, ast.Name) and node.id == "torch":
            yield attributes


@pytest.mark.parametrize("folder", FOLDERS)
def test_torch_has_every_name_that_is_used(folder: str) -> None:
    used = {tuple(name) for path in (ROOT / folder).rglob("*.py") for name in names(ast.parse(path.read_text()))}
    missing = []
    for attributes in used:
        found = torch
        for attribute in attributes:
            if isinstance(found, ModuleType) and not hasattr(found, attribute):
                missing.append(".".join(attributes))
            found = getattr(found, attribute, None)
    assert ("cuda", "empty_cache") in used or folder != "predictor"
    assert missing == []
