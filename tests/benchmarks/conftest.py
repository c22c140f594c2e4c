"""A tiny model for all benchmark tests."""

from pathlib import Path

import pytest

from benchmarks import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of shape `tiny`."""
    directory = tmp_path_factory.mktemp("tiny")
    make_model.make(directory, make_model.SHAPES["tiny"])
    return directory
