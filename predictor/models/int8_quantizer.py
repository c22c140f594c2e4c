"""Fence around transformers' quantizer hooks: int8 weights on a CPU, one scale per output channel.

`tests/contracts/test_upstream.py` tests what this module relies on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from predictor.kernels import shards, tensor_parallel
from predictor.kernels.cpu import experts
from predictor.kernels.cpu.gemm import quantize_per_channel_int8
from predictor.kernels.cpu.layer_table import are_experts
from predictor.kernels.cpu.linear import Int8Linear
from predictor.kernels.shards import Division
from snapshot_format.recipe import INT8_METHOD


def is_skipped(name: str, skip_modules: Sequence[str]) -> bool:
    """Whether a module's name matches `skip_modules`, by transformers' rule for `modules_to_not_convert`."""
    return not should_convert_module(name, list(skip_modules))


@register_quantization_config(INT8_METHOD)
class Int8Config(QuantizationConfigMixin):
    """Quantization config: int8 linear layers and experts, except the output layer and layers with shared weights.

    Args:
        modules_to_not_convert: names, or parts of names, of further layers to skip.
        other: fields that transformers adds to config.json.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **other: Any) -> None:
        super().__init__(INT8_METHOD)
        del other
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(INT8_METHOD)
class Int8Quantizer(HfQuantizer):
    """Replace linear layers by `Int8Linear`, and quantize their weights and those of experts while they load.

    Experts of prepared snapshots are in 16 bits. They are quantized when they are packed.
    """

    requires_calibration = False
    is_trainable = False
    quantized_element_size = 1.0  # bytes per weight

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return (isinstance(module, Int8Linear) and name == "weight") or experts.is_int8_matrix(module, name)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        skip_modules = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        divisions = shards.divisions(model)
        for name, module in list(model.named_modules()):
            is_computable = divisions.get(module) is not Division.OTHER
            if type(module) is nn.Linear and is_computable and not is_skipped(name, skip_modules):
                bias_dtype = None if module.bias is None else module.bias.dtype
                with torch.device("meta"):
                    model.set_submodule(name, Int8Linear(module.in_features, module.out_features, bias_dtype))
        if not self.pre_quantized and tensor_parallel.size() == 1:
            for name, module in model.named_modules():
                if are_experts(module) and not is_skipped(name, skip_modules):
                    experts.prepare_for_int8(module)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        super().update_parallel_plan(model, plan)
        shards.replicate_scales(model, plan)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()


class _Quantize(ConversionOps):
    """Quantize the weights of a file; add their scales."""

    def convert(self, input_dict: dict[str, Any], *, model: Any, **_: Any) -> dict[str, torch.Tensor]:
        converted: dict[str, torch.Tensor] = {}
        for name, weights in input_dict.items():
            weight = weights[0] if isinstance(weights, list) else weights
            module, parameter = get_module_from_name(model, name)
            prefix = name.removesuffix(parameter)
            if experts.is_int8_matrix(module, parameter):
                tensors = experts.quantize(module, parameter, weight)
            else:
                has_part_of_rows = shards.has_part_of_rows(module.get_parameter(parameter))
                qweight, scale = quantize_per_channel_int8(weight, has_part_of_rows=has_part_of_rows)
                tensors = {"weight": qweight, "scale": scale}
            converted |= {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
        return converted
