"""Transformers quantizer for int8 weights on a CPU: one scale per output channel."""

from typing import Any

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from predictor.kernels.cpu.gemm import quantize_per_channel_int8
from predictor.kernels.cpu.linear import Int8Linear
from predictor.models.transformers_quantization import LinearQuantizer
from snapshot_format.recipe import INT8_METHOD


@register_quantization_config(INT8_METHOD)
class Int8Config(QuantizationConfigMixin):
    """Quantization config: int8 linear layers, except the output layer and layers with shared weights.

    Args:
        modules_to_not_convert: names, or parts of names, of further layers to skip.
        other: fields that transformers adds to config.json.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **other: Any) -> None:
        super().__init__(INT8_METHOD)
        del other
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(INT8_METHOD)
class Int8Quantizer(LinearQuantizer):
    """Replace linear layers by `Int8Linear` and quantize their weights while they load."""

    layer_class = Int8Linear

    @property
    def quantized_element_size(self) -> float:
        """Bytes per quantized weight."""
        return 1

    def make_layer(self, linear: nn.Linear) -> Int8Linear:
        """Return an empty `Int8Linear` of the same shape."""
        bias = None if linear.bias is None else linear.bias.dtype
        return Int8Linear(linear.in_features, linear.out_features, bias)

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the int8 weight and one float32 scale per output channel."""
        return quantize_per_channel_int8(weight)
