"""GPTQ and AWQ checkpoints on a CPU, next to float32 models with the same weights."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from predictor.errors import UnsupportedModel
from predictor.kernels.cpu import gemm
from predictor.kernels.cpu.decoder_layer import DecoderLayer
from predictor.kernels.cpu.linear import Int4Linear
from predictor.models import int4_checkpoint, load_plan, loader
from predictor.models.int4_checkpoint import PackedLinear
from predictor.models.loader import LoadedModel
from snapshot_format import int4
from snapshot_format.model_files import CONFIG, SINGLE
from tests.predictor import servers
from tests.predictor.models import packed_checkpoints
from tests.predictor.models.packed_checkpoints import Quantized, Tensors

DIRECTORY = Path("/models/quantized")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
PROMPTS = ("60-91=", "3+4=", "7*8=", "100-1=")


class Case(NamedTuple):
    """A kind of checkpoint."""

    config: dict[str, Any]
    quantization: dict[str, Any]
    """Options of `packed_checkpoints.quantize`."""
    tensors_of: Callable[[str, Quantized], Tensors] = packed_checkpoints.gptq_tensors

    def quantize(self, weight: torch.Tensor) -> Quantized:
        return packed_checkpoints.quantize(weight, self.config["group_size"], **self.quantization)

    def write(self, directory: Path) -> Path:
        return packed_checkpoints.write(directory, self.config, self.quantize, self.tensors_of)


CASES = {
    "gptq": Case(GPTQ, {"symmetric": True}),
    "gptq-zero-points": Case(GPTQ | {"group_size": 32, "sym": False}, {"symmetric": False}),
    "gptq-activation-order": Case(
        GPTQ | {"group_size": 128, "desc_act": True}, {"symmetric": False, "activation_order": True}
    ),
    "gptq-one-group": Case(GPTQ | {"group_size": -1}, {"symmetric": False}),
    "gptq-second-format": Case(
        GPTQ | {"checkpoint_format": "gptq_v2"},
        {"symmetric": False},
        partial(packed_checkpoints.gptq_tensors, zero_offset=0),
    ),
    "awq": Case(AWQ, {"symmetric": False}, packed_checkpoints.awq_tensors),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a case; written once, and not to be changed."""

    @cache
    def write(name: str) -> Path:
        return CASES[name].write(tmp_path_factory.mktemp(name) / "model")

    return write


@pytest.fixture
def copied(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a case's directory, to be changed."""

    def copy(name: str) -> Path:
        for path in written(name).iterdir():
            if path.is_file():
                (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return copy


def logits(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.tensor([loaded.tokenizer.encode("60-91=")])
    with torch.inference_mode():
        return torch.as_tensor(loaded.model(ids).logits).float()


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_has_the_logits_of_its_weights_in_float32(written: Callable[[str], Path], name: str) -> None:
    loaded = loader.load(written(name), device="cpu", dtype="float32")
    assert loaded.quantization == CASES[name].config["quant_method"]
    assert all(isinstance(layer, DecoderLayer) for layer in loaded.model.model.layers)
    expected = logits(loader.load(written(name) / "float32", device="cpu", dtype="float32"))
    assert (logits(loaded) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["gptq-activation-order", "awq"])
def test_checkpoint_is_served_with_the_tokens_of_its_weights_in_float32(
    written: Callable[[str], Path], name: str
) -> None:
    with servers.in_process("--model_dir", str(written(name)), "--dtype", "auto", model_name=name) as server:
        body = {"model": name, "prompt": list(PROMPTS), "temperature": 0, "max_tokens": 24}
        choices = server.client.post("/v1/completions", json=body).json()["choices"]
        properties = server.client.get(f"/v2/models/{name}").json()["properties"]
    assert properties["quantization"] == CASES[name].config["quant_method"]
    expected = loader.load(written(name) / "float32", device="cpu", dtype="float32")
    for prompt, choice in zip(PROMPTS, choices, strict=True):
        ids = torch.tensor(expected.tokenizer.encode(prompt + choice["text"]))
        length = len(expected.tokenizer.encode(prompt))
        with torch.inference_mode():
            logits_of_tokens = expected.model(ids[None]).logits[0, length - 1 : -1]
        chosen = logits_of_tokens.gather(1, ids[length:, None])[:, 0]
        # Activations have 8 bits, so the largest of two almost equal logits may be another one.
        assert (logits_of_tokens.amax(1) - chosen).max() < 0.1 * logits_of_tokens.std()
        assert len(chosen) > 4


@pytest.mark.parametrize("name", CASES)
def test_unpack_gives_exactly_the_weights_of_the_checkpoint(name: str) -> None:
    case = CASES[name]
    layer = case.quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)))
    packing = int4_checkpoint.read_packing(case.config, DIRECTORY)
    tensors = case.tensors_of("layer", layer)
    packed = PackedLinear(256, 64, torch.float32, packing, has_group_indices="layer.g_idx" in tensors)
    stored = {tensor.removeprefix("layer."): value for tensor, value in tensors.items()}
    packed.load_state_dict(stored | {"bias": torch.ones(64)})
    unpacked = packed.unpack()
    assert torch.equal(dequantized(unpacked), layer.dequantized())
    assert (unpacked.zero_point is None) is case.quantization["symmetric"]
    assert unpacked.bias is packed.bias


def dequantized(layer: Int4Linear) -> torch.Tensor:
    zero_point = torch.full_like(layer.scale, 8) if layer.zero_point is None else layer.zero_point.float()
    groups = torch.arange(layer.in_features) // layer.group_size
    columns = (int4.unpack(layer.weight).float() - zero_point[:, groups]) * layer.scale[:, groups]
    weight = torch.empty_like(columns)
    weight[:, slice(None) if layer.input_order is None else layer.input_order] = columns
    return weight


def test_unpack_zero_point_of_zero_borrows_from_the_next_nibble() -> None:
    # GPTQModel subtracts one from each zero point in integers of eight.
    zeros = torch.tensor([[0, 3, 0, 0, 15, 8, 0, 1]])
    stored = sum(int(zero) << 4 * nibble for nibble, zero in enumerate(zeros[0])) - 0x11111111
    packed = PackedLinear(
        32, 8, None, int4_checkpoint.read_packing(GPTQ | {"group_size": 32}, DIRECTORY), has_group_indices=False
    )
    packed.qweight.data.zero_()
    packed.scales.data.fill_(1)
    packed.qzeros.data.fill_(stored)
    zero_point = packed.unpack().zero_point
    assert zero_point is not None
    assert zero_point[:, 0].tolist() == zeros[0].tolist()


def test_layers_whose_inputs_have_different_orders_are_computed_apart(tmp_path: Path) -> None:
    case = CASES["gptq-activation-order"]

    def quantize(weight: torch.Tensor) -> Quantized:
        # The orders of q_proj (128 outputs) and of k_proj and v_proj (64) differ.
        return packed_checkpoints.quantize(weight, 32, symmetric=True, activation_order=True, seed=len(weight))

    packed_checkpoints.write(tmp_path, case.config | {"group_size": 32}, quantize, case.tensors_of)
    loaded = loader.load(tmp_path, device="cpu", dtype="float32")
    assert not any(isinstance(layer, DecoderLayer) for layer in loaded.model.model.layers)
    expected = logits(loader.load(tmp_path / "float32", device="cpu", dtype="float32"))
    assert (logits(loaded) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (GPTQ | {"bits": 8}, "quantized by gptq with bits 8 instead of 4"),
        (GPTQ | {"checkpoint_format": "marlin"}, "gptq with checkpoint_format marlin instead of gptq or gptq_v2"),
        (GPTQ | {"group_size": 16}, "gptq with group_size 16, which is neither -1 nor a multiple of 32"),
        (GPTQ | {"group_size": "128"}, "gptq with group_size 128, which is neither"),
        (
            GPTQ | {"dynamic": {"-:.*o_proj": {}, r"+:.*\.0\..*": {"bits": 8}}},
            "layers of their own bits or group_size (dynamic: +:.*\\.0\\..*)",
        ),
        (AWQ | {"version": "GEMV"}, "awq with version gemv instead of gemm"),
        (AWQ | {"backend": "llm-awq"}, "awq with version llm-awq instead of gemm"),
    ],
    ids=["bits", "format", "group size", "no number", "dynamic", "gemv", "llm-awq"],
)
def test_read_packing_refuses_other_packings_by_name(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel) as raised:
        int4_checkpoint.read_packing(fields, DIRECTORY)
    assert str(raised.value).startswith(f"The weights in {DIRECTORY} are quantized by ")
    assert reason in str(raised.value)
    assert str(raised.value).endswith(
        "Use a GPTQ or AWQ (GEMM) checkpoint of 4 bits, or the original weights with --quantization 4bit or 8bit."
    )


def test_plan_refuses_packing_before_weights_are_read(copied: Callable[[str], Path]) -> None:
    directory = copied("gptq")
    change_config(directory, bits=3)
    with pytest.raises(UnsupportedModel, match="bits 3 instead of 4"):
        load_plan.make_plan(directory, device="cpu")


def change_config(directory: Path, **changes: Any) -> None:
    fields = json.loads((directory / CONFIG).read_text())
    fields["quantization_config"] |= changes
    (directory / CONFIG).write_text(json.dumps(fields))


def test_plan_of_another_device_leaves_the_method_to_transformers(
    written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_plan.make_plan(written("awq"), device="cpu").config.quantization_config["quant_method"] == (
        "kserve_llm_awq"
    )
    monkeypatch.setattr("predictor.models.placement.choose_device", lambda _: torch.device("mps"))
    monkeypatch.setattr("predictor.resources.memory.available_bytes", lambda _: 1 << 30)
    assert load_plan.make_plan(written("awq")).config.quantization_config == AWQ


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.qzeros"),
            "missing or of another shape.*up_proj.qzeros",
        ),
        (
            lambda tensors: tensors.update({"model.experts.0.qweight": torch.zeros(1, dtype=torch.int32)}),
            "have a quantized model.experts.0, which is no linear layer of LlamaForCausalLM",
        ),
        (
            lambda tensors: tensors["model.layers.1.mlp.up_proj.g_idx"].fill_(0),
            r"^model.layers.1.mlp.up_proj in .* cannot be used \(groups of g_idx have other sizes than 64\)",
        ),
    ],
    ids=["missing", "unknown", "groups"],
)
def test_load_refuses_tensors_that_do_not_fit(
    copied: Callable[[str], Path], change: Callable[[Tensors], Any], reason: str
) -> None:
    directory = copied("gptq")
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=reason):
        loader.load(directory, device="cpu")


def test_load_refuses_layers_that_groups_do_not_divide(copied: Callable[[str], Path]) -> None:
    directory = copied("gptq")
    change_config(directory, group_size=256)
    with pytest.raises(UnsupportedModel, match=r"down_proj in .* has 384 inputs and 128 outputs, which groups of 256"):
        loader.load(directory, device="cpu")


def test_plan_refuses_a_cpu_without_kernels(written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "has_int8", lambda: False)
    with pytest.raises(UnsupportedModel, match="quantized by awq, whose kernels need an x86 CPU"):
        load_plan.make_plan(written("awq"), device="cpu")


def test_plan_refuses_to_embed_with_a_quantized_checkpoint(copied: Callable[[str], Path]) -> None:
    directory = copied("gptq")
    with pytest.raises(UnsupportedModel, match="quantized by gptq, but a model that embeds or classifies"):
        load_plan.make_plan(directory, device="cpu", task="embed")
