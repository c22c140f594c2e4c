"""int8 weights on a CPU, one scale per output channel."""

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer

from predictor.kernels.cpu.gemm import quantize_per_channel_int8
from predictor.kernels.cpu.linear import Int8Linear
from predictor.kernels.shards import Division
from predictor.models.linear_quantizer import LinearConfig, LinearQuantizer
from snapshot_format.recipe import INT8_METHOD


@register_quantization_config(INT8_METHOD)
class Int8Config(LinearConfig):
    """Quantization config of int8 linear layers."""

    method = INT8_METHOD


@register_quantizer(INT8_METHOD)
class Int8Quantizer(LinearQuantizer):
    """Replace linear layers by `Int8Linear` and quantize their weights while they load."""

    layer_class = Int8Linear

    def make_layer(self, linear: nn.Linear, bias_dtype: torch.dtype | None, division: Division) -> nn.Module | None:
        if division is Division.OTHER:
            return None
        return Int8Linear(linear.in_features, linear.out_features, bias_dtype)

    def quantize(self, weight: torch.Tensor, has_part_of_rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_per_channel_int8(weight, has_part_of_rows=has_part_of_rows)
