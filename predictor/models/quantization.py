"""Fewer bits behind one word: `none`, `8bit`, `4bit` or `auto`, and what each becomes on each device.

             8bit                        4bit                             auto
    cuda     bitsandbytes LLM.int8       bitsandbytes NF4                 none where the weights fit, else 8bit
    cpu      int8 of our own, `kernels`  bitsandbytes NF4, small but slow 8bit
    mps      refused                     refused                          none

Weights are quantized while they load, by transformers' quantizers, of which the CPU's is registered here. Weights that
come quantized load as they are.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from predictor.errors import StartupError
from predictor.kernels.cpu.gemm import has_int8, quantize_per_channel_int8
from predictor.kernels.cpu.linear import Int8Linear

logger = logging.getLogger(__name__)

INT8 = "kserve_llm_int8"
"""The method's name in a config.json."""
_ROOM = 1.2
"""Free memory over the size of the weights, at which `auto` leaves them as they are on an accelerator."""


def choose(
    word: str,
    device: torch.device,
    of_checkpoint: Any | None,
    weights_bytes: int,
    free_bytes: int,
    *,
    fallback: bool = False,
) -> str:
    """What is done where a word is said: "none", "8bit" or "4bit".

    Args:
        word: "auto", "none", "8bit" or "4bit".
        device: where the model will run.
        of_checkpoint: the checkpoint's own quantization config, if it has one.
        weights_bytes: of the checkpoint.
        free_bytes: on the device.
        fallback: go on with "none", and a warning, where the word cannot be had.

    Raises:
        StartupError: this device cannot do it, or the weights are quantized already.
    """
    method = of_checkpoint.get("quant_method") if isinstance(of_checkpoint, dict) else None
    if method == INT8 and (device.type != "cpu" or not has_int8()):
        raise StartupError(
            f"These weights were rounded for the int8 kernels of an x86 CPU, and this is {device.type}; "
            "use --device cpu on one, or the weights as they were."
        )
    if word == "auto":
        return _fastest(device, of_checkpoint, weights_bytes, free_bytes)
    refusal = None if word == "none" else _refusal(word, device, of_checkpoint)
    if refusal is None:
        return word
    if not fallback:
        raise StartupError(f"{refusal} Or allow --quantization_fallback.")
    logger.warning("%s Going on with none, as --quantization_fallback has it.", refusal)
    return "none"


def config(word: str, device: torch.device, dtype: torch.dtype, keep: Sequence[str] = ()) -> Any | None:
    """What `from_pretrained` takes as `quantization_config`; None where nothing is to be quantized.

    Args:
        word: as `choose` returned it.
        device: where the model will run.
        dtype: in which 4-bit weights compute.
        keep: names, or parts of names, of layers to leave as they are, too.
    """
    if word == "none":
        return None
    if word == "8bit" and device.type == "cpu":
        return Int8Config(list(keep) or None)
    if device.type == "cpu":
        logger.warning("4bit weights are the smallest on a CPU, and slower than 8bit ones")
        # It says so at every layer of every step, and wants `kernels` on AVX-512: that would fetch code from the Hub.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Named layers stand in place of bitsandbytes' own exception, the one that makes the logits.
    skipped = ["lm_head", *keep] if keep else None
    # Parts that do not fit onto a GPU lie in the host's memory, and stay as they are.
    common = {"llm_int8_skip_modules": skipped, "llm_int8_enable_fp32_cpu_offload": True}
    if word == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **common)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **common)


def rounds(model: Any, layer: Any, keep: Sequence[str]) -> bool:
    """Whether a layer of the model is not among those to keep, by the rule that all its layers are held to."""
    return any(part is layer and should_convert_module(name, list(keep)) for name, part in model.named_modules())


def _fastest(device: torch.device, of_checkpoint: Any | None, weights_bytes: int, free_bytes: int) -> str:
    if of_checkpoint is not None or device.type == "mps":
        return "none"
    if device.type == "cpu":
        return "8bit" if has_int8() else "none"
    return "8bit" if weights_bytes * _ROOM > free_bytes else "none"


def _refusal(word: str, device: torch.device, of_checkpoint: Any | None) -> str | None:
    """Why a word cannot be had, and what to say instead; None where it can."""
    if of_checkpoint is not None:
        return f"The weights are quantized already; use --quantization none instead of {word}."
    if device.type == "mps":
        return f"--quantization {word} is not served on mps; use none, or --device cpu."
    if word == "8bit" and device.type == "cpu" and not has_int8():
        return "--quantization 8bit needs an x86 CPU; use none."
    return None


@register_quantization_config(INT8)
class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Linear layers as int8, a scale for each output; but for the last one, and those that share their weights.

    Args:
        modules_to_not_convert: names, or parts of names, of layers to leave as they are, too.
        other: what transformers keeps in a config.json beside it.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **other: Any) -> None:
        super().__init__(INT8)
        del other
        self.modules_to_not_convert = modules_to_not_convert


@register_quantizer(INT8)
class _Int8Quantizer(HfQuantizer):  # type: ignore[misc]
    """Puts an `Int8Linear` in place of each linear layer before weights are loaded, and rounds those that come."""

    requires_calibration = False

    @property
    def quantized_element_size(self) -> float:
        return 1

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Int8Linear) and name == "weight"

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        left_alone = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(name, left_alone):
                bias = None if module.bias is None else module.bias.dtype
                with torch.device("meta"):
                    model.set_submodule(name, Int8Linear(module.in_features, module.out_features, bias))

    def get_quantize_ops(self) -> ConversionOps:
        return _Round()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class _Round(ConversionOps):  # type: ignore[misc]
    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        rounded: dict[str, torch.Tensor] = {}
        for name, weights in input_dict.items():
            weight, scale = quantize_per_channel_int8(weights[0] if isinstance(weights, list) else weights)
            rounded |= {name: weight, f"{name.removesuffix('weight')}scale": scale}
        return rounded
