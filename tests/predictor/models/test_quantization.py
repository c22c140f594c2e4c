from pathlib import Path

import pytest
import torch
import transformers

from devtools.processes import ROOT
from predictor.errors import StartupError
from predictor.models import loader, quantization
from predictor.models.loader import LoadedModel

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


def test_leaves_weights_alone_unless_asked() -> None:
    for of_checkpoint in (None, {"quant_method": "gptq"}):
        assert quantization.choose("none", CPU, of_checkpoint, 100, 1000) == "none"
    assert quantization.config("none", CPU, torch.float32) is None


REFUSED = [
    ("mps", None, "--quantization 8bit is not served on mps; use none, or --device cpu"),
    ("cuda", {"quant_method": "gptq"}, "The weights are quantized already; use --quantization none instead of 8bit"),
]


@pytest.mark.parametrize(("device", "of_checkpoint", "message"), REFUSED)
def test_refuses_by_name(device: str, of_checkpoint: dict[str, str] | None, message: str) -> None:
    with pytest.raises(StartupError, match=f"{message}. Or allow --quantization_fallback"):
        quantization.choose("8bit", torch.device(device), of_checkpoint, 100, 1000)


@pytest.mark.parametrize(("device", "of_checkpoint", "message"), REFUSED)
def test_falls_back_where_that_is_allowed(
    device: str, of_checkpoint: dict[str, str] | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert quantization.choose("8bit", torch.device(device), of_checkpoint, 100, 1000, fallback=True) == "none"
    assert message in caplog.text


def test_weights_rounded_for_a_cpu_are_refused_elsewhere() -> None:
    of_checkpoint = quantization.Int8Config().to_dict()
    with pytest.raises(StartupError, match="int8 kernels of an x86 CPU, and this is cuda"):
        quantization.choose("none", torch.device("cuda"), of_checkpoint, 100, 1000, fallback=True)
    assert quantization.choose("none", CPU, of_checkpoint, 100, 1000) == "none"


def test_layers_can_be_kept_as_they_are() -> None:
    plain, rounded = load(DEMO_MODEL, "none"), load(DEMO_MODEL, "8bit")
    kept = loader.load(
        DEMO_MODEL,
        device="cpu",
        dtype="bfloat16",
        trust_remote_code=False,
        quantization="8bit",
        keep=("down_proj", "o_proj", "lm_head"),
    )
    right = logits(plain)
    assert 0 < (logits(kept) - right).norm() < (logits(rounded) - right).norm()
    all_kept = loader.load(
        DEMO_MODEL,
        device="cpu",
        dtype="bfloat16",
        trust_remote_code=False,
        quantization="8bit",
        keep=("proj", "lm_head"),
    )
    assert torch.equal(logits(all_kept), right)


@pytest.mark.parametrize("word", ["8bit", "4bit"])
def test_bitsandbytes_keeps_what_it_is_told_and_the_head(word: str) -> None:
    config = quantization.config(word, torch.device("cuda"), torch.bfloat16, ["down_proj"])
    assert config is not None
    assert config.llm_int8_skip_modules == ["lm_head", "down_proj"]
