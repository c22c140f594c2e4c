"""Resolve the quantization mode (`none`, `8bit`, `4bit`, `fp8`, `auto`) for a device.

            8bit                   4bit                              fp8              auto
    cuda    bitsandbytes LLM.int8  bitsandbytes NF4                  `fp8_quantizer`  none if the weights fit, else 8bit
    cpu     `int8_quantizer`       `int4_quantizer`                  not supported    8bit
    mps     not supported          not supported                     not supported    none

Transformers quantizes the weights while they load. Quantized checkpoints load unchanged. bitsandbytes cannot quantize
the parts of weights that tensor-parallel ranks have, so with several ranks `auto` on CUDA is `none`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from predictor.errors import StartupError
from predictor.kernels import fp8, tensor_parallel
from predictor.kernels.cpu.gemm import has_int8
from predictor.models.fp8_quantizer import Fp8Config
from predictor.models.int4_quantizer import Int4Config
from predictor.models.int8_quantizer import Int8Config
from predictor.models.linear_quantizer import LinearConfig, is_skipped
from snapshot_format.recipe import INT4_METHOD, INT8_METHOD

logger = logging.getLogger(__name__)

_DIVISIBLE_METHODS = (INT8_METHOD, "fp8")
"""Methods of quantized checkpoints whose weights and scales transformers divides among tensor-parallel ranks."""
_AUTO_HEADROOM = 1.2
"""Ratio of free memory to weight bytes from which `auto` does not quantize on an accelerator."""


def resolve_mode(
    mode: str,
    device: torch.device,
    checkpoint_config: Any | None,
    weight_bytes: int,
    free_bytes: int,
    *,
    fallback: bool = False,
) -> str:
    """Resolve a mode to `none`, `8bit`, `4bit` or `fp8`.

    Args:
        mode: "auto", "none", "8bit", "4bit" or "fp8".
        device: of the model, or of this tensor-parallel rank.
        checkpoint_config: the checkpoint's own quantization config, if it has one.
        weight_bytes: size of the checkpoint's weights, or of this rank's part.
        free_bytes: free memory of the device.
        fallback: resolve an unsupported mode to "none" with a warning.

    Raises:
        StartupError: the device does not support the mode, or the checkpoint is already quantized.
    """
    method = checkpoint_config.get("quant_method") if isinstance(checkpoint_config, dict) else None
    if method in (INT8_METHOD, INT4_METHOD) and (device.type != "cpu" or not has_int8()):
        kernels = "int8" if method == INT8_METHOD else "int4"
        raise StartupError(
            f"These weights are quantized for the {kernels} kernels of an x86 CPU, but the device is {device.type}. "
            "Use --device cpu on an x86 CPU, or the original weights."
        )
    if tensor_parallel.size() > 1 and method not in (None, *_DIVISIBLE_METHODS):
        raise StartupError(
            f"These weights are quantized by {method}, which is not divided among tensor-parallel ranks. Use the "
            f"original weights, weights quantized by {' or '.join(_DIVISIBLE_METHODS)}, or --tensor_parallel_size 1."
        )
    if mode == "auto":
        return _resolve_auto(device, checkpoint_config, weight_bytes, free_bytes)
    reason = None if mode == "none" else _unsupported_reason(mode, device, checkpoint_config)
    if reason is None:
        return mode
    if not fallback:
        raise StartupError(f"{reason} Or set --quantization_fallback.")
    logger.warning("%s Loading without quantization, as --quantization_fallback allows.", reason)
    return "none"


def make_config(
    mode: str, device: torch.device, dtype: torch.dtype, skip_modules: Sequence[str] = ()
) -> BitsAndBytesConfig | LinearConfig | None:
    """Return the `quantization_config` of `from_pretrained` for a resolved mode; None without quantization.

    `dtype` is the compute dtype of 4-bit weights on a GPU.
    """
    if mode == "none":
        return None
    if mode == "fp8":
        return Fp8Config(list(skip_modules) or None)
    if device.type == "cpu":
        return (Int8Config if mode == "8bit" else Int4Config)(list(skip_modules) or None)
    # A list of modules replaces bitsandbytes' default exception, the output layer.
    skipped = ["lm_head", *skip_modules] if skip_modules else None
    # Modules that do not fit on a GPU stay in host memory, unquantized.
    common = {"llm_int8_skip_modules": skipped, "llm_int8_enable_fp32_cpu_offload": True}
    if mode == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **common)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **common)


def should_quantize(model: nn.Module, layer: nn.Module, skip_modules: Sequence[str]) -> bool:
    """Whether `layer` is part of the model and no name of it matches `skip_modules`."""
    return any(module is layer and not is_skipped(name, skip_modules) for name, module in model.named_modules())


def _resolve_auto(device: torch.device, checkpoint_config: Any | None, weight_bytes: int, free_bytes: int) -> str:
    if checkpoint_config is not None or device.type == "mps":
        return "none"
    if device.type == "cpu":
        return "8bit" if has_int8() else "none"
    if tensor_parallel.size() > 1:
        return "none"
    return "8bit" if weight_bytes * _AUTO_HEADROOM > free_bytes else "none"


def _unsupported_reason(mode: str, device: torch.device, checkpoint_config: Any | None) -> str | None:
    if checkpoint_config is not None:
        return f"The weights are already quantized. Use --quantization none instead of {mode}."
    if device.type == "mps":
        return f"--quantization {mode} is not supported on mps. Use none, or --device cpu."
    if mode in ("8bit", "4bit") and device.type == "cpu" and not has_int8():
        return f"--quantization {mode} needs an x86 CPU. Use none."
    if mode == "fp8" and (missing := _missing_fp8(device)):
        return missing
    ranks = tensor_parallel.size()
    if ranks > 1 and (device.type, mode) not in (("cpu", "8bit"), ("cuda", "fp8")):
        instead = "8bit or none" if device.type == "cpu" else "fp8 or none"
        return (
            f"--quantization {mode} on {device.type} does not divide weights among {ranks} tensor-parallel ranks. Use "
            f"{instead}, or --tensor_parallel_size 1."
        )
    return None


def _missing_fp8(device: torch.device) -> str | None:
    needed = ".".join(map(str, fp8.LEAST_CAPABILITY))
    if device.type != "cuda":
        found = f"the device is {device.type}"
    elif (capability := torch.cuda.get_device_capability(device)) < fp8.LEAST_CAPABILITY:
        found = f"{device} has {capability[0]}.{capability[1]}"
    else:
        return None
    # bitsandbytes is not divided among ranks.
    instead = "none" if device.type == "cuda" and tensor_parallel.size() > 1 else "8bit"
    return (
        f"--quantization fp8 needs a GPU of compute capability {needed} or later, as L4, L40S, H100 and H200 have, but "
        f"{found}. Use {instead}."
    )
