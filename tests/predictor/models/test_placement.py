import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from devtools.paths import DEMO_MODEL
from predictor.engine.engine import Engine
from predictor.errors import StartupError
from predictor.models import loader, placement
from predictor.settings import Settings
from predictor.types import SamplingParams

CUDA = torch.device("cuda", 1)
GIB = 2**30


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_choose_device_unavailable_raises(device: str) -> None:
    assert placement.choose_device("auto").type in ("cpu", "mps")
    with pytest.raises(StartupError, match=f"--device is {device}, but torch finds no such device"):
        placement.choose_device(device)


def test_choose_device_selects_gpu_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placement.choose_device("cuda") == torch.device("cuda", 0)
    assert placement.choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(StartupError, match="--device is cuda:2, but the last GPU is cuda:1"):
        placement.choose_device("cuda:2")


@pytest.mark.parametrize(("mode", "weight_gib"), [("none", 14), ("8bit", 30), ("fp8", 30)])
def test_place_weights_that_fit_are_placed_on_the_gpu(mode: str, weight_gib: int) -> None:
    assert placement.place(CUDA, mode, weight_gib * GIB, 24 * GIB, lambda: 0).device_map == {"": CUDA}


def test_place_weights_beyond_gpu_memory_are_offloaded_to_the_host() -> None:
    offloaded = placement.place(CUDA, "none", 30 * GIB, 24 * GIB, lambda: 64 * GIB)
    assert offloaded.device_map == "auto"
    assert offloaded.max_memory == {1: int(24 * GIB * 0.85), "cpu": int(64 * GIB * 0.8)}


def test_place_weights_beyond_both_memories_raises() -> None:
    expected = r"weights need 30\.0 GiB with quantization none.*cuda:1.*Use fewer bits or a larger GPU"
    with pytest.raises(StartupError, match=expected):
        placement.place(CUDA, "none", 30 * GIB, 24 * GIB, lambda: 8 * GIB)


def test_place_on_cpu_has_no_memory_limit() -> None:
    assert placement.place(torch.device("cpu"), "none", 100 * GIB, GIB, lambda: GIB).max_memory is None


def test_engine_with_offloaded_layers_generates_the_same_tokens(tmp_path: Path) -> None:
    layers = json.loads((DEMO_MODEL / "config.json").read_text())["num_hidden_layers"]
    devices: dict[str, str] = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(layers)}
    devices |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, device_map=devices, offload_folder=tmp_path
    ).eval()
    assert Counter(placement.device_map(offloaded).values())["disk"] == layers - 1
    whole = loader.load(DEMO_MODEL, device="cpu", dtype="float32").model
    assert placement.device_map(whole) == {}
    assert asyncio.run(_generate(offloaded)) == asyncio.run(_generate(whole))


async def _generate(model: torch.nn.Module) -> list[int]:
    settings = Settings(max_num_seqs=4, max_queued_requests=1, max_num_batched_tokens=128, kv_cache_tokens=1024)
    engine = Engine.from_model(model, settings, eos_token_ids=frozenset({2}), context_tokens=256)
    engine.start()
    try:
        sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        [stream] = engine.submit([([5, 6, 7, 8], sampling)], float("inf"))
        return [token async for step in stream for token in step.token_ids]
    finally:
        engine.stop()
