"""SECURITY.md: what it names exists."""

import re
import subprocess

import pytest

from devtools.paths import ROOT

ROWS = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if re.search(r"\| `test_", line)]


def test_security_every_threat_has_a_place_and_a_test() -> None:
    assert len(ROWS) == (ROOT / "SECURITY.md").read_text().count("\n| ") - 1 > 10


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.split("|")[1:3]))
def test_security_places_and_tests_exist(row: str) -> None:
    *_, places, tests, _ = row.split("|")
    for place in re.findall(r"`([^`]+)`", places):
        assert (ROOT / place).is_file(), place
    for test in re.findall(r"`(test_\w+)`", tests):
        found = subprocess.run(["grep", "-rlw", f"def {test}", "tests"], cwd=ROOT, capture_output=True, check=False)
        assert found.stdout, test
