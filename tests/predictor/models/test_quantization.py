import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from devtools.architectures import CASES, save_model
from devtools.paths import DEMO_MODEL
from predictor.errors import StartupError
from predictor.kernels.cpu.experts import PackedExperts
from predictor.kernels.fp8 import Fp8Linear
from predictor.models import load_plan, loader, quantization
from predictor.models.fp8_quantizer import Fp8Config
from predictor.models.int4_quantizer import Int4Config
from predictor.models.int8_quantizer import Int8Config
from predictor.models.linear_quantizer import LinearConfig
from predictor.models.loader import LoadedModel
from snapshot_format.model_files import CONFIG, SINGLE
from tests.predictor.models.conftest import LoadDemo

CPU = torch.device("cpu")
GPTQ = {"quant_method": "gptq"}


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        output = loaded.model(torch.tensor([loaded.tokenizer.encode("60-91=")])).logits
    assert isinstance(output, torch.Tensor)
    return output.float()


@pytest.mark.parametrize(("mode", "tolerance"), [("8bit", 0.05), ("4bit", 0.1)])
def test_quantized_logits_are_close_to_unquantized(load_demo: LoadDemo, mode: str, tolerance: float) -> None:
    assert load_demo(mode).quantization == mode
    quantized, unquantized = logits(load_demo(mode)), logits(load_demo("none"))
    assert not torch.equal(quantized, unquantized)
    assert (quantized - unquantized).norm() < tolerance * unquantized.norm()


@pytest.mark.parametrize(
    ("device", "free_bytes", "resolved"),
    [("cpu", 1000, "8bit"), ("mps", 10, "none"), ("cuda", 1000, "none"), ("cuda", 110, "8bit")],
)
def test_resolve_mode_auto_takes_the_fastest_mode_that_fits(device: str, free_bytes: int, resolved: str) -> None:
    assert quantization.resolve_mode("auto", torch.device(device), None, 100, free_bytes) == resolved
    assert quantization.resolve_mode("auto", torch.device(device), GPTQ, 100, free_bytes) == "none"


@pytest.mark.parametrize("checkpoint_config", [None, GPTQ], ids=["plain", "gptq"])
def test_resolve_mode_none_stays_none(checkpoint_config: dict[str, str] | None) -> None:
    assert quantization.resolve_mode("none", CPU, checkpoint_config, 100, 1000) == "none"
    assert quantization.make_config("none", CPU, torch.float32) is None


UNSUPPORTED = pytest.mark.parametrize(
    ("device", "checkpoint_config", "message"),
    [
        ("mps", None, "--quantization 8bit is not supported on mps. Use none, or --device cpu."),
        ("cuda", GPTQ, "The weights are already quantized. Use --quantization none instead of 8bit."),
    ],
    ids=["mps", "gptq"],
)


@UNSUPPORTED
def test_resolve_mode_unsupported_raises(device: str, checkpoint_config: dict[str, str] | None, message: str) -> None:
    with pytest.raises(StartupError, match=f"^{message} Or set --quantization_fallback"):
        quantization.resolve_mode("8bit", torch.device(device), checkpoint_config, 100, 1000)


@UNSUPPORTED
def test_resolve_mode_unsupported_with_fallback_warns(
    device: str, checkpoint_config: dict[str, str] | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    resolved = quantization.resolve_mode("8bit", torch.device(device), checkpoint_config, 100, 1000, fallback=True)
    assert resolved == "none"
    assert message in caplog.text


@pytest.mark.parametrize(("config", "kernels"), [(Int8Config, "int8"), (Int4Config, "int4")])
def test_resolve_mode_of_weights_for_a_cpu_on_gpu_raises(config: type[LinearConfig], kernels: str) -> None:
    checkpoint_config = config().to_dict()
    with pytest.raises(StartupError, match=f"{kernels} kernels of an x86 CPU, but the device is cuda"):
        quantization.resolve_mode("none", torch.device("cuda"), checkpoint_config, 100, 1000, fallback=True)
    assert quantization.resolve_mode("none", CPU, checkpoint_config, 100, 1000) == "none"


def test_skip_modules_are_not_quantized(load_demo: LoadDemo) -> None:
    def load(*skip_modules: str) -> torch.Tensor:
        return logits(
            loader.load(DEMO_MODEL, device="cpu", dtype="bfloat16", quantization="8bit", skip_modules=skip_modules)
        )

    unquantized = logits(load_demo("none"))
    some_skipped, all_skipped = load("down_proj", "o_proj", "lm_head"), load("proj", "lm_head")
    assert 0 < (some_skipped - unquantized).norm() < (logits(load_demo("8bit")) - unquantized).norm()
    assert torch.equal(all_skipped, unquantized)


@pytest.mark.parametrize(
    ("skip_modules", "expected"), [([], True), (["lm_head"], False), (["head"], False), (["other"], True)]
)
def test_should_quantize_follows_skip_modules(skip_modules: list[str], expected: bool) -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(1, 1)})
    assert quantization.should_quantize(model, model["lm_head"], skip_modules) is expected
    assert not quantization.should_quantize(model, nn.Linear(1, 1), skip_modules)


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    return torch.device("cuda", 0)


def test_resolve_mode_fp8_on_a_gpu_that_has_it(ada: torch.device) -> None:
    assert quantization.resolve_mode("fp8", ada, None, 100, 1000) == "fp8"
    config: Any = quantization.make_config("fp8", ada, torch.bfloat16, ["down_proj"])
    assert (type(config), config.modules_to_not_convert) == (Fp8Config, ["down_proj"])
    with pytest.raises(StartupError, match=r"already quantized\. Use --quantization none instead of fp8"):
        quantization.resolve_mode("fp8", ada, {"quant_method": "fp8"}, 100, 1000)


def test_resolve_mode_fp8_on_an_older_gpu_names_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    expected = (
        r"needs a GPU of compute capability 8\.9 or later, .* cuda:1 has 8\.6\. Use 8bit\. Or set --quantization_f"
    )
    with pytest.raises(StartupError, match=expected):
        quantization.resolve_mode("fp8", torch.device("cuda", 1), None, 100, 1000)


def test_resolve_mode_fp8_on_older_gpus_of_several_ranks_does_not_name_8bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr("predictor.kernels.tensor_parallel.size", lambda: 2)
    with pytest.raises(StartupError, match=r"cuda:0 has 8\.6\. Use none\."):
        quantization.resolve_mode("fp8", torch.device("cuda", 0), None, 100, 1000)


def test_make_plan_fp8_on_a_cpu_fails_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(StartupError, match=r"--quantization fp8 needs a GPU .* the device is cpu\. Use 8bit"):
        load_plan.make_plan(DEMO_MODEL, device="cpu", quantization="fp8")
    assert load_plan.make_plan(DEMO_MODEL, device="cpu", quantization="fp8", fallback=True).quantization == "none"


def test_fp8_weights_are_quantized_while_they_load_and_answers_stay_correct(load_demo: LoadDemo) -> None:
    """On a CPU, where torch has the same multiplication."""
    plan = load_plan.make_plan(DEMO_MODEL, device="cpu", dtype="bfloat16", skip_modules=["down_proj"])
    loaded = loader.execute(replace(plan, quantization="fp8", quantization_config=Fp8Config(["down_proj"])))
    assert loaded.quantization == "fp8"
    mlp = loaded.model.model.layers[0].mlp
    assert type(loaded.model.model.layers[0].self_attn.q_proj) is Fp8Linear
    assert type(mlp.down_proj) is not Fp8Linear
    assert type(loaded.model.lm_head) is not Fp8Linear
    quantized, unquantized = logits(loaded), logits(load_demo("none"))
    assert 0 < (quantized - unquantized).norm() < 0.1 * unquantized.norm()


@pytest.mark.parametrize("mode", ["8bit", "4bit"])
def test_bitsandbytes_config_skips_modules_and_lm_head(mode: str) -> None:
    config: Any = quantization.make_config(mode, torch.device("cuda"), torch.bfloat16, ["down_proj"])
    assert config.llm_int8_skip_modules == ["lm_head", "down_proj"]


def save_mxfp4(directory: Path) -> None:
    """Save a tiny gpt-oss whose experts are in MXFP4: pairs of 4-bit values, and an exponent for each 32 of them."""
    save_model(CASES["gpt_oss"], directory)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in load_file(directory / SINGLE).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = experts, outputs, inputs // 32
            tensors[f"{name}_blocks"] = torch.randint(256, (*blocks, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(120, 124, blocks, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    fields = json.loads((directory / CONFIG).read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    content = fields | {"dtype": "bfloat16", "quantization_config": quantization_config}
    (directory / CONFIG).write_text(json.dumps(content))


def test_mxfp4_weights_are_bfloat16_on_a_cpu(tmp_path: Path) -> None:
    save_mxfp4(tmp_path)
    loaded = loader.load(tmp_path, device="cpu")
    assert loaded.quantization == "none"
    assert sum(isinstance(module, PackedExperts) for module in loaded.model.modules()) == 3
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).float()
    ids = torch.tensor([list(range(5, 45))])
    with torch.inference_mode():
        ours, expected = loaded.model(ids).logits[0].float(), exact(ids).logits[0]
    assert ((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.05
