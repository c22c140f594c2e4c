"""Fence around transformers' quantizer hooks: fp8 weights on a GPU, one scale per output channel.

`tests/contracts/test_upstream.py` tests what this module relies on, as for `int8_quantizer`.
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from predictor.kernels import shards, tensor_parallel
from predictor.kernels.fp8 import ALIGNMENT, Fp8Linear, quantize_rows
from predictor.models.int8_quantizer import is_skipped

FP8_METHOD = "kserve_llm_fp8"


@register_quantization_config(FP8_METHOD)
class Fp8Config(QuantizationConfigMixin):
    """Quantization config: fp8 linear layers, except the output layer and layers whose sizes no kernel supports.

    Args:
        modules_to_not_convert: names, or parts of names, of further layers to skip.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None) -> None:
        super().__init__(FP8_METHOD)
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(FP8_METHOD)
class Fp8Quantizer(HfQuantizer):
    """Replace linear layers by `Fp8Linear` and quantize their weights while they load."""

    requires_calibration = False
    is_trainable = False
    quantized_element_size = 1.0  # bytes per weight

    def is_serializable(self) -> bool:
        return False

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Fp8Linear) and name == "weight"

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        skip_modules = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear or is_skipped(name, skip_modules):
                continue
            # Of a tensor-parallel rank's part, too, whichever size is divided.
            alignment = ALIGNMENT * tensor_parallel.size()
            if module.in_features % alignment == module.out_features % alignment == 0:
                bias_dtype = None if module.bias is None else module.bias.dtype
                with torch.device("meta"):
                    layer = Fp8Linear(module.in_features, module.out_features, bias_dtype)
                # Its forward function gets this rank's part of parameters and inputs.
                layer._hf_quantized_needs_local_tp = True
                model.set_submodule(name, layer)

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
            weight, scale = quantize_rows(
                weights[0] if isinstance(weights, list) else weights,
                has_part_of_rows=shards.has_part_of_rows(model.get_parameter(name)),
            )
            converted |= {name: weight, f"{name.removesuffix('weight')}scale": scale[:, 0]}
        return converted
