"""Relative links of the documents: their files and headings exist."""

import re
import unicodedata
from functools import cache
from pathlib import Path

import pytest

from devtools.documentation.repository_links import rewrite
from devtools.paths import ROOT
from tests.documents.fences import DOCUMENTS

FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
HEADING = re.compile(r"^#+ +(.+?)(?: +\{#(?P<id>[\w-]+)\})? *$", re.MULTILINE)
ID = re.compile(r"\bid=\"([^\"]+)\"")


@cache
def anchors(document: Path) -> frozenset[str]:
    """The anchors of a document, as the repository's server and as the site make them."""
    text = FENCE.sub("", document.read_text())
    found = set(ID.findall(text))
    for heading, own in HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower().strip()
        word = re.sub(r"[^\w\s-]", "", plain)
        ascii_word = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode()
        found |= {own, re.sub(r"\s", "-", word), re.sub(r"[-\s]+", "-", ascii_word)}
    return frozenset(found - {""})


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_of_a_document_lead_to_files_and_headings(document: Path) -> None:
    wrong = []
    for link in LINK.finditer(FENCE.sub("", (ROOT / document).read_text())):
        target = (ROOT / document).parent / link["path"] if link["path"] else ROOT / document
        if not target.exists():
            wrong.append(f"{link[0]}: no such file")
        elif link["anchor"] and target.suffix == ".md" and link["anchor"] not in anchors(target.resolve()):
            wrong.append(f"{link[0]}: no such heading")
    assert wrong == []


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../../predictor/README.md#b)", "[a](https://host/o/r/blob/HEAD/predictor/README.md#b)"),
        ("[a](../../kustomize)", "[a](https://host/o/r/tree/HEAD/kustomize)"),
        ("[a](../glossary.md)", "[a](../glossary.md)"),
        ("[a](https://other/x)", "[a](https://other/x)"),
        ("```text\n[a](../../predictor)\n```", "```text\n[a](../../predictor)\n```"),
    ],
)
def test_links_that_leave_docs_lead_to_the_repository(link: str, expected: str) -> None:
    assert rewrite(link, "how-to/gpu.md", "https://host/o/r") == expected


def test_link_to_a_missing_file_is_a_warning_which_fails_a_strict_build(caplog: pytest.LogCaptureFixture) -> None:
    rewrite("[a](../../none.md)", "how-to/gpu.md", "https://host/o/r")
    assert "how-to/gpu.md: the repository has no none.md" in caplog.text
