"""docs/architectures.md holds what serving each architecture gives."""

import pytest

from devtools import architectures

REPRESENTATIVE = {"falcon, new decoder", "nemotron", "qwen2, sliding window"}
"""Served by different code, each in about a second. Refusals take no time."""


def is_slow(name: str) -> bool:
    return name not in REPRESENTATIVE and "refused" not in architectures.rows_in_document()[name]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if is_slow(name) else ()) for name in architectures.CASES],
)
def test_architecture_gives_the_documented_row(name: str) -> None:
    row = architectures.describe(name)
    assert row == architectures.rows_in_document()[name]
    assert "DIFFERS" not in row


def test_document_has_every_case_and_no_other() -> None:
    head = {"Model", "---"}
    assert set(architectures.rows_in_document()) - head == set(architectures.CASES)
