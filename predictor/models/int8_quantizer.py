"""int8 weights on a CPU, one scale per output channel."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from predictor.kernels import tensor_parallel
from predictor.kernels.cpu import experts
from predictor.kernels.cpu.gemm import quantize_per_channel_int8
from predictor.kernels.cpu.layer_table import are_experts
from predictor.kernels.cpu.linear import Int8Linear
from predictor.kernels.shards import Division
from predictor.models.linear_quantizer import LinearConfig, LinearQuantizer, is_skipped
from snapshot_format.recipe import INT8_METHOD


@register_quantization_config(INT8_METHOD)
class Int8Config(LinearConfig):
    """Quantization config of int8 linear layers and experts."""

    method = INT8_METHOD


@register_quantizer(INT8_METHOD)
class Int8Quantizer(LinearQuantizer):
    """Replace linear layers by `Int8Linear`, and quantize their weights and those of experts while they load.

    Experts of prepared snapshots are in 16 bits. They are quantized when they are packed.
    """

    layer_class = Int8Linear

    def make_layer(self, linear: nn.Linear, bias_dtype: torch.dtype | None, division: Division) -> nn.Module | None:
        if division is Division.OTHER:
            return None
        return Int8Linear(linear.in_features, linear.out_features, bias_dtype)

    def quantize(self, weight: torch.Tensor, has_part_of_rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_per_channel_int8(weight, has_part_of_rows=has_part_of_rows)

    def quantize_parameter(self, module: nn.Module, name: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        if experts.is_int8_matrix(module, name):
            return experts.quantize(module, name, weight)
        return super().quantize_parameter(module, name, weight)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **options: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return experts.is_int8_matrix(module, name) or super().param_needs_quantization(model, param_name, **options)

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, **options)
        if not self.pre_quantized and tensor_parallel.size() == 1:
            skip_modules = self.skipped_modules(model)
            for name, module in model.named_modules():
                if are_experts(module) and not is_skipped(name, skip_modules):
                    experts.prepare_for_int8(module)
