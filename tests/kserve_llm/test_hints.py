"""Hints from facts about machine and model."""

from pathlib import Path

import pytest

from kserve_llm import hints as module
from kserve_llm.hints import hints

PLAIN = {"task": "generate", "device": "cpu", "dtype": "bfloat16", "quantization": "none"}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU with VNNI and without a GPU."""
    monkeypatch.setattr(module, "cpu_flags", lambda: ["fpu", "avx512_vnni"])
    monkeypatch.setattr(module, "NVIDIA_DEVICE", tmp_path / "nvidiactl")


@pytest.mark.parametrize(("dtype", "part"), [("bfloat16", "half"), ("float16", "half"), ("float32", "a quarter")])
def test_hint_of_8_bits_has_the_part_of_the_bytes(dtype: str, part: str) -> None:
    [hint] = hints("hf://a/b", PLAIN | {"dtype": dtype}, [])
    assert f"reads {part} of the bytes" in hint
    assert hint.endswith("kserve-llm bench hf://a/b --quantization 8bit")


@pytest.mark.parametrize("flags", [["--quantization", "none"], ["--quantization=none"]])
def test_hint_of_8_bits_is_left_out_if_quantization_was_chosen(flags: list[str]) -> None:
    assert not list(hints("hf://a/b", PLAIN, flags))


@pytest.mark.parametrize("properties", [{"quantization": "8bit"}, {"device": "cuda:0"}, {"task": "embed"}])
def test_hint_of_8_bits_is_left_out_where_it_does_not_apply(properties: dict[str, str]) -> None:
    assert not list(hints("hf://a/b", PLAIN | properties, []))


def test_hint_of_8_bits_is_left_out_on_a_cpu_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_flags", lambda: ["fpu", "avx2"])
    assert not list(hints("hf://a/b", PLAIN, []))


def test_hint_names_a_gpu_that_is_not_used() -> None:
    module.NVIDIA_DEVICE.touch()
    found = list(hints("hf://a/b", PLAIN | {"quantization": "8bit"}, []))
    assert found == [
        "This machine has an NVIDIA GPU, which this build of torch does not use. Install torch's CUDA build."
    ]
    assert not list(hints("hf://a/b", PLAIN | {"quantization": "8bit"}, ["--device", "cpu"]))
