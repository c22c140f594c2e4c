"""Linear layers in fp8 (e4m3): one scale per output channel of the weights, and one per token of the activations.

Both are multiplied in fp8 by `torch.nn.functional.scaled_mm`, which is part of torch: transformers' own fp8 layers
fetch their kernels from the Hub when they first run.
"""

import torch
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

from predictor.kernels import tensor_parallel

FP8 = torch.float8_e4m3fn
ALIGNMENT = 16
"""Both sizes of a weight have to be divisible by this."""
LEAST_CAPABILITY = (8, 9)
"""Compute capability of the first CUDA devices with fp8 arithmetic: Ada (L4, L40S), then Hopper (H100, H200)."""
_LARGEST = torch.finfo(FP8).max
_LEAST_SCALE = 1e-30
"""So that rows of zeros are not divided by zero."""


def quantize_rows(rows: torch.Tensor, *, has_part_of_rows: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows (n, size) in fp8 and their scales (n, 1) in float32, whose products are close to the rows.

    `has_part_of_rows`: each tensor-parallel rank has some columns; the scales are those of the whole rows.
    """
    scales = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    if has_part_of_rows:
        scales = tensor_parallel.all_reduce_max(scales)
    scales = scales.div_(_LARGEST).clamp_(min=_LEAST_SCALE)
    return (rows / scales).to(FP8), scales


class Fp8Linear(nn.Module):
    """Linear layer whose weights are quantized by `quantize_rows`.

    Args:
        in_features: size of an input, divisible by `ALIGNMENT`.
        out_features: size of an output, likewise.
        bias_dtype: None for a layer without a bias.
    """

    def __init__(self, in_features: int, out_features: int, bias_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=FP8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        bias = None if bias_dtype is None else torch.empty(out_features, dtype=bias_dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), in the inputs' dtype; of a tensor-parallel rank, its part."""
        rows, scales = quantize_rows(inputs.reshape(-1, inputs.shape[-1]))
        # CUDA has kernels with scales per row for bfloat16 outputs only.
        outputs = scaled_mm(
            rows,
            self.weight.t(),
            scales,
            ScalingType.RowWise,
            self.scale[None],
            ScalingType.RowWise,
            output_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        outputs = outputs.to(inputs.dtype).view(*inputs.shape[:-1], outputs.shape[-1])
        return outputs if self.bias is None else outputs + self.bias
