"""Fields shared by the protocols."""

import pytest

from predictor.errors import InvalidRequest
from predictor.protocols.sampling_fields import TIMEOUT_HEADER, timeout_seconds


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon"])
def test_timeout_that_is_not_a_positive_number_raises(text: str) -> None:
    with pytest.raises(InvalidRequest, match="x-request-timeout-seconds is not a positive number"):
        timeout_seconds({TIMEOUT_HEADER: text})
    assert timeout_seconds({TIMEOUT_HEADER: "1.5"}) == 1.5
    assert timeout_seconds({}) is None
