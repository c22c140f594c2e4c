"""The demo model, loaded once per quantization mode, and helpers for broken copies of it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from devtools.paths import DEMO_MODEL
from predictor.models import loader
from predictor.models.loader import LoadedModel

LoadDemo = Callable[[str], LoadedModel]
Rewrite = Callable[..., None]


@pytest.fixture(scope="session")
def load_demo() -> LoadDemo:
    """Return the demo model in bfloat16 on the CPU, by quantization mode; loaded once per mode."""

    @cache
    def load(mode: str) -> LoadedModel:
        return loader.load(DEMO_MODEL, device="cpu", dtype="bfloat16", quantization=mode)

    return load


@pytest.fixture
def rewrite(weights: Path) -> Rewrite:
    """Replace the link to a JSON file in `weights` by a copy with other fields."""

    def rewrite_fields(name: str, **fields: Any) -> None:
        content = json.loads((weights / name).read_text())
        (weights / name).unlink()
        (weights / name).write_text(json.dumps(content | fields))

    return rewrite_fields
