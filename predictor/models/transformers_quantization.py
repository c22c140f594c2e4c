"""Fence: the only user of transformers' internal quantizer hooks in the predictor.

`tests/contracts/test_upstream.py` holds what this module relies on.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module


def is_skipped(name: str, skip_modules: Sequence[str]) -> bool:
    """Whether a module's name matches `skip_modules`, by transformers' rule for `modules_to_not_convert`."""
    return not should_convert_module(name, list(skip_modules))


class LinearQuantizer(HfQuantizer):
    """Base of quantizers that replace linear layers and quantize their weights while they load."""

    requires_calibration = False
    layer_class: ClassVar[type[nn.Module]]
    """The quantized layer: parameters `weight` and `scale`, and `bias` or None."""

    @abstractmethod
    def make_layer(self, linear: nn.Linear) -> nn.Module:
        """Return an empty quantized layer that replaces `linear`."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the quantized weight and its scales."""

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether a parameter of the file is the weight of a replaced layer."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, self.layer_class) and name == "weight"

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        skip_modules = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and not is_skipped(name, skip_modules):
                with torch.device("meta"):
                    model.set_submodule(name, self.make_layer(module))

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that transformers applies to each weight as it is read."""
        return _Quantize(self)

    def is_serializable(self) -> bool:
        """Whether a model with these layers can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether a model with these layers can be trained."""
        return False


class _Quantize(ConversionOps):
    """Quantize the weights of a file; add their scales."""

    def __init__(self, quantizer: LinearQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        converted: dict[str, torch.Tensor] = {}
        for name, weights in input_dict.items():
            weight, scale = self._quantizer.quantize(weights[0] if isinstance(weights, list) else weights)
            converted |= {name: weight, f"{name.removesuffix('weight')}scale": scale}
        return converted
