"""docs/stability.md: what is promised exists."""

import re

import pytest

from devtools import stable_interface
from devtools.paths import ROOT


@pytest.fixture(scope="module")
def current() -> dict[str, set[str]]:
    return stable_interface.current()


@pytest.mark.parametrize("kind", sorted(stable_interface.promised()))
def test_promised_names_exist(kind: str, current: dict[str, set[str]]) -> None:
    missing = stable_interface.promised()[kind] - current[kind]
    assert not missing, "keep the name, or deprecate it first as docs/stability.md says"


def test_every_kind_of_names_is_promised(current: dict[str, set[str]]) -> None:
    assert stable_interface.promised().keys() == current.keys()
    assert all(stable_interface.promised().values())


def test_stability_page_names_existing_tests() -> None:
    page = (ROOT / "docs/stability.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", page)
    assert names
    assert [name for name in names if f"def {name}(" not in sources] == []
