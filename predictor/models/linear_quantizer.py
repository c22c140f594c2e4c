"""Fence around transformers' quantizer hooks: what our quantizers of linear layers have in common.

`tests/contracts/test_upstream.py` tests what this module relies on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from predictor.kernels import shards
from predictor.kernels.shards import Division

QuantizeParameter = Callable[[nn.Module, str, torch.Tensor], Mapping[str, torch.Tensor]]
"""Returns a module's quantized tensors by name, of the module, the name of a parameter and its weight."""


def is_skipped(name: str, skip_modules: Sequence[str]) -> bool:
    """Whether a module's name matches `skip_modules`, by transformers' rule for `modules_to_not_convert`."""
    return not should_convert_module(name, list(skip_modules))


class LinearConfig(QuantizationConfigMixin):
    """Quantization config of a method without settings.

    Args:
        modules_to_not_convert: names, or parts of names, of layers to skip, besides those that are always skipped.
        other: fields that transformers adds to config.json.
    """

    method: ClassVar[str]
    """`quant_method` in config.json."""

    def __init__(self, modules_to_not_convert: list[str] | None = None, **other: Any) -> None:
        super().__init__(self.method)
        del other
        self.modules_to_not_convert = modules_to_not_convert


class LinearQuantizer(HfQuantizer):
    """Replace linear layers by quantized ones, with parameters `weight` and `scale`, while their weights load.

    The output layer and layers with shared weights are skipped.
    """

    requires_calibration = False
    is_trainable = False
    quantized_element_size = 1.0  # bytes per element of `weight`
    layer_class: ClassVar[type[nn.Module]]

    def is_serializable(self) -> bool:
        return True

    def make_layer(self, linear: nn.Linear, bias_dtype: torch.dtype | None, division: Division) -> nn.Module | None:
        """Return the layer that replaces `linear`, which ranks divide so, on the current device; None to keep it."""
        raise NotImplementedError

    def quantize(self, weight: torch.Tensor, has_part_of_rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the quantized weight and its scales.

        Args:
            weight: (out_features, in_features).
            has_part_of_rows: whether this tensor-parallel rank has some of the columns only.
        """
        raise NotImplementedError

    def quantize_parameter(self, module: nn.Module, name: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return a module's quantized tensors by name."""
        qweight, scale = self.quantize(weight, shards.has_part_of_rows(module.get_parameter(name)))
        return {"weight": qweight, "scale": scale}

    def skipped_modules(self, model: Any) -> list[str]:
        """Return names, or parts of names, of modules to skip."""
        names: list[str] = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        return names

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, self.layer_class) and name == "weight"

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        skip_modules = self.skipped_modules(model)
        divisions = shards.divisions(model)
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear or is_skipped(name, skip_modules):
                continue
            with torch.device("meta"):
                bias_dtype = None if module.bias is None else module.bias.dtype
                layer = self.make_layer(module, bias_dtype, divisions.get(module, Division.NONE))
            if layer is not None:
                model.set_submodule(name, layer)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        super().update_parallel_plan(model, plan)
        shards.replicate_scales(model, plan)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantize_parameter)


class _Quantize(ConversionOps):
    """Quantize the weights of a file; add their scales."""

    def __init__(self, quantize: QuantizeParameter) -> None:
        self._quantize = quantize

    def convert(self, input_dict: dict[str, Any], *, model: Any, **_: Any) -> dict[str, torch.Tensor]:
        converted: dict[str, torch.Tensor] = {}
        for name, weights in input_dict.items():
            module, parameter = get_module_from_name(model, name)
            tensors = self._quantize(module, parameter, weights[0] if isinstance(weights, list) else weights)
            converted |= {f"{name.removesuffix(parameter)}{key}": tensor for key, tensor in tensors.items()}
        return converted
