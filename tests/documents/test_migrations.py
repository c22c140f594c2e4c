"""docs/how-to/from-*.md: our flags and their values are the predictor's, and names of TGI's requests are refused."""

import os
import re
from pathlib import Path

import pytest

from devtools.paths import ROOT
from predictor import settings
from predictor.protocols.field_tables import REFUSED_PARAMETERS

HOW_TO = ROOT / "docs/how-to"
FLAG = re.compile(r"`--([a-z_]+)(?: (\w+))?`")


def table(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the table whose heading begins with this text."""
    lines = page.read_text().partition(heading)[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("peer", ["vllm", "tgi", "huggingfaceserver"])
def test_migration_flags_here_are_settings_with_the_documented_values(
    peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    page = HOW_TO / f"from-{peer}.md"
    rows = table(page, {"vllm": "| vLLM | Here |", "tgi": "| TGI | Here | |", "huggingfaceserver": "| hugging"}[peer])
    assert len(rows) >= 15
    for _, here, note in rows:
        for name, value in FLAG.findall(f"{here} {note}"):
            assert name in settings.Settings.model_fields, name
            if value:
                parsed = settings.parse([f"--{name}", value], settings.Settings)
                assert str(getattr(parsed, name)) == value


def test_migration_flags_of_kserve_exist() -> None:
    from kserve.model_server import parser

    text = parser.format_help()
    page = (HOW_TO / "from-huggingfaceserver.md").read_text()
    for flag in ("--http_port", "--grpc_port", "--enable_grpc", "--workers", "--max_threads", "--max_asyncio_workers"):
        assert f"{flag} " in text
        assert f"`{flag}`" in page


def test_migration_names_of_tgi_are_refused_with_the_name_to_use() -> None:
    page = HOW_TO / "from-tgi.md"
    ignored = set(re.findall(r"`(\w+)`", page.read_text().partition("with the name to use. ")[2].partition(" are")[0]))
    assert ignored == {"details", "top_n_tokens"}
    for theirs, here in table(page, "| TGI | OpenAI's completions here |"):
        if here == "the same" or theirs == here:
            continue
        for name in re.findall(r"`(\w+)", theirs):
            if name in REFUSED_PARAMETERS:
                continue
            assert name in ignored | {"inputs"}, name
        if refusal := REFUSED_PARAMETERS.get(theirs.strip("`")):
            assert any(word in refusal.reason for word in re.findall(r"\w+", here)), theirs
