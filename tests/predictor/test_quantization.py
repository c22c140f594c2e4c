import pytest
import torch

from demo.processes import ROOT
from predictor import loader, quantization
from predictor.errors import StartupError

DEMO_MODEL = ROOT / "demo" / "model"
CPU = torch.device("cpu")


def footprint(word: str) -> int:
    loaded = loader.load(DEMO_MODEL, device="cpu", dtype="float32", trust_remote_code=False, quantization=word)
    assert loaded.quantization == word
    return int(loaded.model.get_memory_footprint())


def test_weights_of_fewer_bits_take_less_memory() -> None:
    assert footprint("4bit") < footprint("8bit") < footprint("none")


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
