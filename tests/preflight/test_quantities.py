"""Quantities and durations in the notations of Kubernetes and Knative."""

import pytest

from preflight import quantities


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("13m", 780), ("1h30m", 5400), ("500ms", 0.5)])
def test_seconds_parses_go_durations(text: str, expected: float) -> None:
    assert quantities.seconds(text) == expected


@pytest.mark.parametrize("text", ["13", "", "1 m", "m", 60, None])
def test_seconds_invalid_duration_raises(text: object) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        quantities.seconds(text)


@pytest.mark.parametrize(("text", "expected"), [("500m", 0.5), ("2", 2), ("1Gi", 2**30), ("5G", 5e9)])
def test_number_parses_quantities(text: str, expected: float) -> None:
    assert quantities.number(text) == expected
