"""fp8 weights on a GPU, one scale per output channel."""

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer

from predictor.kernels import tensor_parallel
from predictor.kernels.fp8 import ALIGNMENT, Fp8Linear, quantize_rows
from predictor.kernels.shards import Division
from predictor.models.linear_quantizer import LinearConfig, LinearQuantizer

FP8_METHOD = "kserve_llm_fp8"


@register_quantization_config(FP8_METHOD)
class Fp8Config(LinearConfig):
    """Quantization config of fp8 linear layers."""

    method = FP8_METHOD


@register_quantizer(FP8_METHOD)
class Fp8Quantizer(LinearQuantizer):
    """Replace linear layers by `Fp8Linear` and quantize their weights while they load.

    Layers whose sizes no kernel supports are skipped.
    """

    layer_class = Fp8Linear

    def is_serializable(self) -> bool:
        return False

    def make_layer(self, linear: nn.Linear, bias_dtype: torch.dtype | None, division: Division) -> nn.Module | None:
        del division
        # Of a tensor-parallel rank's part, too, whichever size is divided.
        alignment = ALIGNMENT * tensor_parallel.size()
        if linear.in_features % alignment or linear.out_features % alignment:
            return None
        layer = Fp8Linear(linear.in_features, linear.out_features, bias_dtype)
        # Its forward function gets this rank's part of parameters and inputs.
        layer._hf_quantized_needs_local_tp = True
        return layer

    def quantize(self, weight: torch.Tensor, has_part_of_rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        qweight, scale = quantize_rows(weight, has_part_of_rows=has_part_of_rows)
        return qweight, scale[:, 0]
