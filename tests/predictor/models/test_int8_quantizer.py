from pathlib import Path

import pytest
import torch
import transformers

from devtools.architectures import CASES, make_prompts, save_model
from devtools.paths import DEMO_MODEL
from predictor.kernels.cpu import experts
from predictor.kernels.cpu.gemm import quantize_per_channel_int8
from predictor.kernels.cpu.layer_table import are_experts
from predictor.kernels.cpu.linear import Int8Linear
from predictor.models import loader
from predictor.models.int8_quantizer import Int8Config
from snapshot_format.recipe import INT8_CPU, INT8_METHOD
from storage_initializer.prepare import quantized_checkpoint
from tests.predictor.models.conftest import LoadDemo


def test_int8_checkpoint_loads_with_the_same_logits(tmp_path: Path, load_demo: LoadDemo) -> None:
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.bfloat16, quantization_config=Int8Config()
    )
    assert {type(module) for name, module in quantized.named_modules() if name.endswith("proj")} == {Int8Linear}
    quantized.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    assert f'"quant_method": "{INT8_METHOD}"' in (tmp_path / "config.json").read_text()
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.7 * (DEMO_MODEL / "model.safetensors").stat().st_size

    loaded, expected = loader.load(tmp_path, device="cpu", dtype="bfloat16"), load_demo("8bit")
    assert loaded.quantization == "8bit"
    ids = torch.tensor([expected.tokenizer.encode("60-91=")])
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, expected.model(ids).logits)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_quantized_while_they_load(tmp_path: Path, name: str) -> None:
    save_model(CASES[name], tmp_path)
    options = {"dtype": torch.bfloat16, "local_files_only": True}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options, quantization_config=Int8Config())
    assert sum(map(are_experts, quantized.modules())) == 3
    for expected, module in zip(plain.modules(), quantized.modules(), strict=False):
        if are_experts(expected):
            check_experts(expected, module)


def check_experts(expected: torch.nn.Module, quantized: torch.nn.Module) -> None:
    for matrix in experts.MATRICES:
        weights, qweights = expected.get_parameter(matrix), quantized.get_parameter(matrix)
        if expected.is_transposed:
            weights, qweights = weights.mT, qweights.mT
        qweight, scale = quantize_per_channel_int8(weights[2].detach())
        assert qweights.dtype == torch.int8
        assert torch.equal(qweights[2], qweight)
        assert torch.equal(quantized.get_parameter(f"{matrix}_scale")[2], scale)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_of_a_prepared_snapshot_are_those_quantized_while_loading(tmp_path: Path, name: str) -> None:
    source, prepared = tmp_path / "source", tmp_path / "prepared"
    for directory in (source, prepared):
        directory.mkdir()
    save_model(CASES[name], source)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(prepared)
    for file in quantized_checkpoint.plan(INT8_CPU, source, name, ()).files:
        (prepared / file.path).write_bytes(b"".join(file.chunks()))
    ids = torch.tensor([make_prompts()[3]])
    logits = []
    for directory, quantization in ((source, "8bit"), (prepared, "auto")):
        loaded = loader.load(directory, device="cpu", dtype="float32", quantization=quantization)
        assert loaded.quantization == "8bit"
        assert not any(map(are_experts, loaded.model.modules()))
        with torch.inference_mode():
            logits.append(loaded.model(ids, use_cache=False).logits)
    assert torch.equal(*logits)


def test_skipped_experts_are_not_quantized(tmp_path: Path) -> None:
    save_model(CASES["mixtral"], tmp_path)
    config = Int8Config(["layers.0.mlp.experts"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=config
    )
    dtypes = [layer.mlp.experts.gate_up_proj.dtype for layer in model.model.layers]
    assert dtypes == [torch.bfloat16, torch.int8, torch.int8]
