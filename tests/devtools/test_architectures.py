"""docs/architectures.md holds what serving each architecture gives."""

import pytest

from devtools import architectures

REPRESENTATIVE = {"falcon, new decoder", "nemotron", "qwen2, sliding window"}
"""Served by different code, each in about a second. Refusals take no time."""

POOLING = {"deberta-v2, embeddings", "qwen3, classifier"}


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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in POOLING else pytest.mark.slow) for name in architectures.POOLING_CASES],
)
def test_model_that_embeds_or_classifies_gives_the_documented_row(name: str) -> None:
    assert architectures.describe_pooling(name) == architectures.rows_in_document()[name]


def test_document_has_every_case_and_no_other() -> None:
    rows = architectures.rows_in_document()
    head = {"Model", "---"}
    assert set(rows) - head == {*architectures.CASES, *architectures.POOLING_CASES}
    assert "DIFFERS" not in "".join(rows.values())
