"""Fence around transformers' quantizer hooks: 4-bit checkpoints of GPTQ and AWQ on a CPU.

transformers' own quantizers of these methods need packages with kernels of their own.
`tests/contracts/test_upstream.py` tests what this module relies on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from predictor.errors import UnsupportedModel
from predictor.kernels.cpu import gemm
from predictor.models.int4_checkpoint import METHODS, PackedLinear, Packing, read_packing
from predictor.types import Task

_PREFIX = "kserve_llm_"
"""Of the methods' names here; transformers has quantizers of their own names."""
_ADVICE = "Use the original weights with --quantization 8bit."


def replace_method(config: Any, directory: Path, task: Task) -> None:
    """Make transformers load a GPTQ or AWQ checkpoint by `PackedLinear`s; other configs are unchanged.

    Args:
        config: of transformers, to be changed.
        directory: of the model, for messages.
        task: of the server.

    Raises:
        UnsupportedModel: no kernel of this CPU supports the checkpoint, or the model does not generate.
    """
    fields = getattr(config, "quantization_config", None)
    if isinstance(fields, dict) and fields.get("quant_method") in METHODS:
        subject = f"The weights in {directory} are quantized by {fields['quant_method']}"
        if task is not Task.GENERATE:
            raise UnsupportedModel(
                f"{subject}, but a model that embeds or classifies is served unquantized. Use the original weights."
            )
        if not gemm.has_int8():
            raise UnsupportedModel(f"{subject}, whose kernels need an x86 CPU. Use the original weights.")
        read_packing(fields, directory)
        config.quantization_config = {**fields, "quant_method": _PREFIX + fields["quant_method"]}


def checkpoint_method(quant_method: str) -> str:
    """Return the method that config.json names."""
    method = quant_method.removeprefix(_PREFIX)
    return method if method in METHODS else quant_method


class PackedInt4Config(QuantizationConfigMixin):
    """Quantization config of a checkpoint.

    Args:
        quant_method: our name of the method.
        fields: as the checkpoint has them.
    """

    def __init__(self, quant_method: str, **fields: Any) -> None:
        super().__init__(quant_method)
        self.fields = fields

    def packing(self, directory: Path) -> Packing:
        """Return how the tensors are packed."""
        return read_packing({**self.fields, "quant_method": checkpoint_method(str(self.quant_method))}, directory)


class PackedInt4Quantizer(HfQuantizer):
    """Replace the linear layers that are quantized in the checkpoint by `PackedLinear`s."""

    requires_calibration = True
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Sequence[str], **_: Any) -> None:
        directory = Path(checkpoint_files[0]).parent
        packing = self.quantization_config.packing(directory)
        stored = {name for path in checkpoint_files for name in _tensor_names(path)}
        for name in sorted(tensor.removesuffix(".qweight") for tensor in stored if tensor.endswith(".qweight")):
            linear = _linear(model, name, packing, directory)
            bias_dtype = None if linear.bias is None else linear.bias.dtype
            has_group_indices = f"{name}.g_idx" in stored
            with torch.device("meta"):
                layer = PackedLinear(
                    linear.in_features, linear.out_features, bias_dtype, packing, has_group_indices=has_group_indices
                )
            model.set_submodule(name, layer)


for _method in METHODS:
    register_quantization_config(_PREFIX + _method)(PackedInt4Config)
    register_quantizer(_PREFIX + _method)(PackedInt4Quantizer)


def _tensor_names(path: str) -> list[str]:
    with safe_open(path, "pt") as opened:
        return list(opened.keys())


def _linear(model: nn.Module, name: str, packing: Packing, directory: Path) -> nn.Linear:
    """Return the linear layer of a name.

    Raises:
        UnsupportedModel: there is none, or its weights cannot be packed so.
    """
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise UnsupportedModel(
            f"The weights in {directory} have a quantized {name}, which is no linear layer of "
            f"{type(model).__name__} in transformers. {_ADVICE}"
        )
    if linear.in_features % max(packing.group_size, 32) or linear.out_features % 8:
        raise UnsupportedModel(
            f"{name} in {directory} has {linear.in_features} inputs and {linear.out_features} outputs, which "
            f"groups of {packing.group_size} inputs and integers of 8 outputs do not divide. {_ADVICE}"
        )
    return linear
