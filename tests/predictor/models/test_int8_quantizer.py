from pathlib import Path

import torch
import transformers

from devtools.paths import DEMO_MODEL
from predictor.kernels.cpu.linear import Int8Linear
from predictor.models import loader
from predictor.models.int8_quantizer import Int8Config
from snapshot_format.recipe import INT8_METHOD
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
