from pathlib import Path

import torch
import transformers
from torch import nn

from devtools.architectures import CASES, make_prompts, save_model
from devtools.paths import DEMO_MODEL
from predictor.kernels.cpu.layer_table import are_experts
from predictor.kernels.cpu.linear import Int4Linear
from predictor.models import loader, quantization
from predictor.models.int4_quantizer import Int4Config
from predictor.models.loader import LoadedModel
from snapshot_format.recipe import INT4_METHOD
from tests.predictor.models.conftest import LoadDemo


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = loaded.model(torch.tensor([loaded.tokenizer.encode("60-91=")])).logits
    return output


def test_4bit_on_a_cpu_is_int4_with_an_output_layer_in_int8(load_demo: LoadDemo) -> None:
    assert type(quantization.make_config("4bit", torch.device("cpu"), torch.bfloat16)) is Int4Config
    loaded = load_demo("4bit")
    assert (loaded.quantization, loaded.int8_kernels) == ("4bit", load_demo("8bit").int8_kernels)
    assert logits(loaded).dtype == torch.float32
    assert not any(isinstance(module, (nn.Linear, Int4Linear)) for module in loaded.model.modules())


def test_4bit_skips_modules(load_demo: LoadDemo) -> None:
    def load(skip_modules: list[str]) -> torch.Tensor:
        return logits(
            loader.load(DEMO_MODEL, device="cpu", dtype="bfloat16", quantization="4bit", skip_modules=skip_modules)
        )

    unquantized = logits(load_demo("none"))
    skipping_all = load(["proj", "lm_head"])
    assert torch.equal(skipping_all, unquantized)
    skipping_some = load(["down_proj"])
    assert 0 < (skipping_some - unquantized).norm() < (logits(load_demo("4bit")) - unquantized).norm()


def test_int4_checkpoint_loads_with_the_same_logits(tmp_path: Path, load_demo: LoadDemo) -> None:
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.bfloat16, quantization_config=Int4Config()
    )
    assert {type(module) for name, module in quantized.named_modules() if name.endswith("proj")} == {Int4Linear}
    quantized.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    assert f'"quant_method": "{INT4_METHOD}"' in (tmp_path / "config.json").read_text()
    loaded = loader.load(tmp_path, device="cpu", dtype="bfloat16")
    assert loaded.quantization == "4bit"
    assert torch.equal(logits(loaded), logits(load_demo("4bit")))


def test_4bit_keeps_layers_whose_inputs_are_not_whole_groups(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, head_dim=32
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Int4Config()
    )
    layer = quantized.model.layers[0]
    assert {type(layer.self_attn.q_proj), type(layer.mlp.up_proj)} == {nn.Linear}
    assert {type(layer.self_attn.o_proj), type(layer.mlp.down_proj)} == {Int4Linear}


def test_4bit_quantizes_experts_to_int8(tmp_path: Path) -> None:
    save_model(CASES["mixtral"], tmp_path)
    ids = torch.tensor([make_prompts()[3]])
    logits = {}
    for mode in ("none", "8bit", "4bit"):
        loaded = loader.load(tmp_path, device="cpu", dtype="float32", quantization=mode)
        assert any(map(are_experts, loaded.model.modules())) is (mode == "none")
        with torch.inference_mode():
            logits[mode] = loaded.model(ids, use_cache=False).logits
    errors = [(logits[mode] - logits["none"]).norm() for mode in ("8bit", "4bit")]
    assert 0 < errors[0] < errors[1] < logits["none"].norm()
