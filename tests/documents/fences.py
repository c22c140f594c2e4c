"""Fenced blocks of the Markdown documents."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from devtools.paths import ROOT

PATTERNS = (
    "*.md",
    "*/README.md",
    "docs/**/*.md",
    "examples/*/README.md",
    "kustomize/*/*/README.md",
    "manifests/*/*.md",
)
DOCUMENTS = sorted({path.relative_to(ROOT) for pattern in PATTERNS for path in ROOT.glob(pattern)})
"""Every document that readers see."""
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```\s*?$", re.MULTILINE | re.DOTALL)
_INFO = re.compile(r"(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    line: int
    """Line of its opening fence, from 1."""
    language: str
    text: str
    title: str = ""
    """File name of its content, where the fence gives one."""


def blocks(document: Path, *languages: str) -> list[Block]:
    """Return the blocks of a document, a path below ROOT, in these languages, or all."""
    text = (ROOT / document).read_text()
    found = []
    for fence in _FENCE.finditer(text):
        info = _INFO.fullmatch(fence["info"].strip())
        assert info, f"{document}: the fence has unknown attributes: {fence['info']}"
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(line, info["language"], textwrap.dedent(fence["text"]), info["title"] or ""))
    return [block for block in found if not languages or block.language in languages]


def documents_with(*languages: str) -> list[Path]:
    """Return the documents that have a block in one of these languages."""
    return [document for document in DOCUMENTS if blocks(document, *languages)]
