from pathlib import Path

import pytest
import torch
import transformers

from demo.processes import ROOT
from predictor import loader, quantization
from predictor.errors import StartupError
from predictor.loader import LoadedModel

DEMO_MODEL = ROOT / "demo" / "model"
CPU = torch.device("cpu")


def load(directory: Path, word: str) -> LoadedModel:
    return loader.load(directory, device="cpu", dtype="bfloat16", trust_remote_code=False, quantization=word)


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        output = loaded.model(torch.tensor([loaded.tokenizer.encode("60-91=")])).logits
    assert isinstance(output, torch.Tensor)
    return output.float()


@pytest.mark.parametrize("word", ["8bit", "4bit"])
def test_fewer_bits_say_about_the_same(word: str) -> None:
    loaded = load(DEMO_MODEL, word)
    assert loaded.quantization == word
    plain = logits(load(DEMO_MODEL, "none"))
    fewer = logits(loaded)
    assert not torch.equal(fewer, plain)
    assert (fewer - plain).norm() < {"8bit": 0.05, "4bit": 0.3}[word] * plain.norm()


def test_weights_rounded_before_load_as_they_are(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.bfloat16, quantization_config=quantization.Int8Config()
    )
    rounded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.7 * (DEMO_MODEL / "model.safetensors").stat().st_size
    loaded = load(tmp_path, "none")
    assert loaded.quantization == "8bit"
    assert torch.equal(logits(loaded), logits(load(DEMO_MODEL, "8bit")))


@pytest.mark.parametrize(
    ("device", "free", "chosen"),
    [("cpu", 1000, "8bit"), ("mps", 10, "none"), ("cuda", 1000, "none"), ("cuda", 110, "8bit")],
)
def test_auto_takes_what_fits_and_is_fastest(device: str, free: int, chosen: str) -> None:
    assert quantization.choose("auto", torch.device(device), None, 100, free) == chosen
    assert quantization.choose("auto", torch.device(device), {"quant_method": "gptq"}, 100, free) == "none"
    assert quantization.choose("4bit", torch.device(device), None, 100, free) == "4bit"


def test_leaves_weights_alone_unless_asked() -> None:
    assert quantization.config("none", CPU, torch.float32, of_checkpoint=None) is None
    assert quantization.config("none", CPU, torch.float32, of_checkpoint={"quant_method": "gptq"}) is None


@pytest.mark.parametrize(
    ("device", "of_checkpoint", "message"),
    [
        ("mps", None, "--quantization 8bit is not served on mps; use none, or --device cpu"),
        ("cuda", {"quant_method": "gptq"}, "The weights are quantized already; use --quantization none"),
    ],
)
def test_refuses_by_name(device: str, of_checkpoint: dict[str, str] | None, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        quantization.config("8bit", torch.device(device), torch.float16, of_checkpoint)


def test_weights_rounded_for_a_cpu_are_refused_elsewhere() -> None:
    of_checkpoint = quantization.Int8Config().to_dict()
    with pytest.raises(StartupError, match="int8 kernels of an x86 CPU, and this is cuda"):
        quantization.config("none", torch.device("cuda"), torch.float16, of_checkpoint)
    assert quantization.config("none", CPU, torch.bfloat16, of_checkpoint) is None
