import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from devtools.processes import ROOT
from predictor.engine.engine import Engine
from predictor.errors import StartupError
from predictor.models import loader, placement
from predictor.types import SamplingParams

DEMO_MODEL = ROOT / "demo" / "model"
CUDA = torch.device("cuda", 1)
GIB = 2**30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_names_a_device_that_is_not_there() -> None:
    assert placement.choose_device("auto").type in ("cpu", "mps")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(StartupError, match=f"--device is {device}, but torch sees no such device here"):
            placement.choose_device(device)


def test_a_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placement.choose_device("cuda") == torch.device("cuda", 0)
    assert placement.choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(StartupError, match="--device is cuda:2, but the last GPU that torch sees is cuda:1"):
        placement.choose_device("cuda:2")


def test_weights_that_fit_lie_on_the_gpu() -> None:
    assert placement.place(CUDA, "none", 14 * GIB, 24 * GIB, lambda: 0).device_map == {"": CUDA}
    assert placement.place(CUDA, "8bit", 30 * GIB, 24 * GIB, lambda: 0).device_map == {"": CUDA}


def test_what_does_not_fit_lies_in_the_hosts_memory() -> None:
    placed = placement.place(CUDA, "none", 30 * GIB, 24 * GIB, lambda: 64 * GIB)
    assert placed.device_map == "auto"
    assert placed.max_memory == {1: int(24 * GIB * 0.85), "cpu": int(64 * GIB * 0.8)}
    with pytest.raises(StartupError, match=r"weights take 30\.0 GiB in none.*cuda:1.*use fewer bits or a larger GPU"):
        placement.place(CUDA, "none", 30 * GIB, 24 * GIB, lambda: 8 * GIB)


def test_a_cpu_takes_it_all() -> None:
    assert placement.place(torch.device("cpu"), "none", 100 * GIB, GIB, lambda: GIB).max_memory is None


def test_the_engine_serves_what_is_brought_in_layer_by_layer(tmp_path: Path) -> None:
    layers = json.loads((DEMO_MODEL / "config.json").read_text())["num_hidden_layers"]
    places: dict[str, str] = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(layers)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    ).eval()
    assert Counter(placement.describe(offloaded).values())["disk"] == layers - 1
    assert asyncio.run(_tokens(offloaded)) == asyncio.run(_tokens(_whole()))


def _whole() -> torch.nn.Module:
    model = loader.load(DEMO_MODEL, device="cpu", dtype="float32", trust_remote_code=False).model
    assert placement.describe(model) == {}
    return model


async def _tokens(model: torch.nn.Module) -> list[int]:
    limits = {"max_num_seqs": 4, "max_queued_requests": 1, "max_num_batched_tokens": 128, "kv_cache_tokens": 1024}
    engine = Engine.from_model(model, eos_token_ids=frozenset({2}), context_tokens=256, **limits)
    engine.start()
    try:
        sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        [stream] = engine.submit([([5, 6, 7, 8], sampling)], float("inf"))
        return [token async for step in stream for token in step.token_ids]
    finally:
        engine.stop()
