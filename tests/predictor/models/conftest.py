"""The demo model, loaded once per quantization mode, and helpers for broken copies of it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from devtools.paths import DEMO_MODEL
from predictor.models import loader
from predictor.models.loader import LoadedModel
from snapshot_format.model_files import INDEX, SINGLE

LoadDemo = Callable[[str], LoadedModel]
Rewrite = Callable[..., None]
Shard = Callable[[str], None]


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


@pytest.fixture
def shard(weights: Path) -> Shard:
    """Replace the weights in `weights` by an index and two shards in a folder, "" for the directory itself."""

    def write_shards(folder: str) -> None:
        tensors = load_file(weights / SINGLE)
        (weights / SINGLE).unlink()
        (weights / folder).mkdir(exist_ok=True)
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            path = (Path(folder) / f"model-0000{number}-of-00002.safetensors").as_posix()
            save_file({name: tensors[name] for name in part}, weights / path, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, path)
        (weights / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return write_shards
