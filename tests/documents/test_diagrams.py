"""SVG images of the documentation."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from devtools.paths import ROOT

DIAGRAMS = sorted((ROOT / "docs/images").rglob("*.svg"))
NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("path", DIAGRAMS, ids=lambda path: path.stem)
def test_diagram_is_legible_on_light_and_dark_pages_and_requests_nothing(path: Path) -> None:
    text = path.read_text()
    root = ElementTree.fromstring(text)  # noqa: S314
    assert "prefers-color-scheme: dark" in text
    # A background of its own: the page may have the other scheme than the system.
    width, height = root.attrib["viewBox"].split()[2:]
    background = root.find(f"{NAMESPACE}rect")
    assert background is not None
    assert (background.attrib["class"], background.attrib["width"], background.attrib["height"]) == (
        "paper",
        width,
        height,
    )
    # No color but those that have a dark form.
    colors = re.findall(r"(?<!-)\b(?:fill|stroke)[:=]\s*\"?([^;\"}]+)", text)
    assert [color for color in colors if color != "none" and not color.startswith("var(--")] == []
    assert re.findall(r"(?:href|src)=|@import|<script|url\((?!#)", text) == []
    title = root.find(f"{NAMESPACE}title")
    assert title is not None
    assert title.text


def test_every_picture_is_shown_on_a_page() -> None:
    pages = "".join(path.read_text() for path in (*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("*/*.md")))
    pictures = [path for path in (ROOT / "docs/images").rglob("*") if path.is_file()]
    assert len(pictures) > len(DIAGRAMS)
    assert [str(path) for path in pictures if f"images/{path.relative_to(ROOT / 'docs/images')}" not in pages] == []
