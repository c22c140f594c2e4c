"""Export a model for OpenVINO GenAI with quantized weights; runs in that peer's environment.

`python -m benchmarks.peers.openvino_export MODEL_DIR TARGET --bits 8`
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import openvino
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

QUANTIZATION: dict[int, dict[str, Any]] = {8: {"bits": 8}, 4: {"bits": 4, "group_size": 32, "sym": True, "ratio": 1.0}}
"""int4 is symmetric in groups of 32 in all layers but the embedding and the output, which NNCF keeps in int8."""


def write(model_dir: Path, target: Path, bits: int) -> None:
    """Export the model in `model_dir` to the folder `target`."""
    with tempfile.TemporaryDirectory() as folder:
        compatible = Path(folder)
        for file in model_dir.resolve().iterdir():
            if file.name != "config.json":
                (compatible / file.name).symlink_to(file.resolve())
        config = json.loads((model_dir / "config.json").read_text())
        # This environment's transformers is older than the project's.
        config |= {"torch_dtype": config["dtype"], "rope_theta": config["rope_parameters"]["rope_theta"]}
        (compatible / "config.json").write_text(json.dumps(config))
        quantization = OVWeightQuantizationConfig(**QUANTIZATION[bits])
        model = OVModelForCausalLM.from_pretrained(compatible, export=True, quantization_config=quantization)
        model.save_pretrained(target)
    write_tokenizer(target)
    (target / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())


def write_tokenizer(target: Path) -> None:
    """Write a tokenizer of three tokens: the pipeline loads one, and prompts are token ids.

    The converter accepts no tokenizer without merges, as `benchmarks.make_model` writes it.
    """
    model = models.BPE({"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="a")  # noqa: S106 - no password
    for name, converted in zip(
        ("openvino_tokenizer", "openvino_detokenizer"), convert_tokenizer(small, with_detokenizer=True), strict=True
    ):
        openvino.save_model(converted, target / f"{name}.xml")


def main() -> None:
    """Export the model that the flags name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, choices=sorted(QUANTIZATION), required=True)
    arguments = parser.parse_args()
    write(arguments.model_dir, arguments.target, arguments.bits)


if __name__ == "__main__":
    main()
