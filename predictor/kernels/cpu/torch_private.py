"""Adapter for private operators of torch, as of torch 2.13.

Torch offers no public way to prepack weights for oneDNN or fbgemm, or to choose fbgemm's activation scales.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_OPERATORS = {
    "mkldnn": ("_is_mkldnn_bf16_supported", "_linear_pointwise", "_reorder_linear_weight"),
    "quantized": ("linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32"),
}
_FBGEMM = "fbgemm"


def check_operators() -> None:
    """Raise ImportError if this release of torch does not have an operator that is used here."""
    missing = [
        f"torch.ops.{namespace}.{name}"
        for namespace, names in _OPERATORS.items()
        for name in names
        if not hasattr(getattr(torch.ops, namespace), name)
    ]
    if not hasattr(torch, "_make_per_channel_quantized_tensor"):
        missing.append("torch._make_per_channel_quantized_tensor")
    if missing:
        raise ImportError(
            f"Operators missing in torch {torch.__version__}: {', '.join(missing)}. Install the pinned torch."
        )


def supports_onednn_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Reorder bfloat16 weights (out_features, in_features) into oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)


def onednn_linear(inputs: torch.Tensor, packed_weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply bfloat16 inputs (..., in_features) by weights of `onednn_pack_weight`."""
    return torch.ops.mkldnn._linear_pointwise(inputs, packed_weight, bias, "none", [], "")


def supports_fbgemm() -> bool:
    """Whether this CPU has fbgemm's int8 kernels: x86 with AVX2."""
    return _FBGEMM in torch.backends.quantized.supported_engines


def fbgemm_pack_weight(qweight: torch.Tensor, scale: torch.Tensor) -> Any:
    """Pack int8 weights (out_features, in_features) into fbgemm's layout."""
    torch.backends.quantized.engine = _FBGEMM
    zero_point = torch.zeros(len(scale), dtype=torch.long)
    quantized = torch._make_per_channel_quantized_tensor(qweight.contiguous(), scale.double(), zero_point, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def fbgemm_linear(inputs: torch.Tensor, scale: float, zero_point: int, packed_weight: Any) -> torch.Tensor:
    """Quantize float32 inputs to uint8 with one scale, multiply them by packed weights, return float32."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(inputs, scale, zero_point, packed_weight)


@contextmanager
def ignore_deprecated_quantization() -> Iterator[None]:
    """Ignore the deprecation of quantized tensors, the only way to fbgemm's weight layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        yield


check_operators()
