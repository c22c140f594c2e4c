"""int4 weights on a CPU, one scale per group of inputs. They are not divided among tensor-parallel ranks."""

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer

from predictor.kernels.cpu.linear import Int4Linear
from predictor.kernels.shards import Division
from predictor.models.linear_quantizer import LinearConfig, LinearQuantizer
from snapshot_format import int4
from snapshot_format.recipe import INT4_GROUP_SIZE, INT4_METHOD


@register_quantization_config(INT4_METHOD)
class Int4Config(LinearConfig):
    """Quantization config of int4 linear layers."""

    method = INT4_METHOD


@register_quantizer(INT4_METHOD)
class Int4Quantizer(LinearQuantizer):
    """Replace linear layers by `Int4Linear` and quantize their weights while they load.

    Layers whose inputs are not whole groups are skipped.
    """

    layer_class = Int4Linear

    def make_layer(self, linear: nn.Linear, bias_dtype: torch.dtype | None, division: Division) -> nn.Module | None:
        del division
        if linear.in_features % INT4_GROUP_SIZE:
            return None
        return Int4Linear(linear.in_features, linear.out_features, bias_dtype, group_size=INT4_GROUP_SIZE)

    def quantize(self, weight: torch.Tensor, has_part_of_rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        del has_part_of_rows
        return int4.quantize(weight)
