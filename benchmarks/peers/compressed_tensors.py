"""Write the checkpoint of vLLM's int8: W8A8 in the format of compressed-tensors.

Weights of linear layers are int8 with one scale per output channel, rounded as the predictor's 8 bits are. Activations
are quantized by the server, one scale per token. Embedding and output layer stay as they are, as vLLM requires.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from predictor.kernels.cpu.gemm import quantize_per_channel_int8

_LINEAR = "_proj.weight"
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def write(model_dir: Path, target: Path) -> None:
    """Quantize the model in `model_dir` into the new folder `target`."""
    target.mkdir()
    for file in model_dir.iterdir():
        if file.suffix == ".json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION_CONFIG
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read(model_dir).items():
        if name.endswith(_LINEAR):
            tensors[name], scale = quantize_per_channel_int8(tensor)
            tensors[f"{name}_scale"] = scale.unsqueeze(1)
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def read(model_dir: Path) -> dict[str, Any]:
    """Return all tensors of a snapshot by name; the files are mapped, not read."""
    tensors: dict[str, Any] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
    return tensors
