"""Heads of keys and values in int8, the form of a KV cache in 8 bits; `csrc/int8_heads.h` reads and writes the same.

A head of head_dim numbers has a bfloat16 scale for each 32 of them, after the numbers. It depends on nothing but the
token that it belongs to, so that it is the same in any batch, chunk of a prompt and shared prefix.
"""

import torch
from torch.nn.functional import pad

GROUP = 32
"""Numbers that share a scale, `SCALE_GROUP` in `int8_heads.h`. The last group of a head may be shorter."""
_LEAST_MAGNITUDE = 2.0**-100
"""Smaller groups are zeros: their scales would have too few bits."""


def head_bytes(head_dim: int) -> int:
    """Return the bytes of a head."""
    return head_dim + 2 * _num_groups(head_dim)


def quantize(states: torch.Tensor) -> torch.Tensor:
    """Quantize heads (..., head_dim) to (..., `head_bytes`), int8. A group that is not finite becomes NaN."""
    head_dim = states.shape[-1]
    groups = _to_groups(states.float())
    magnitude = groups.abs().amax(-1)
    # Rounded up, so that no number exceeds 127.
    rounded = ((magnitude / 127).view(torch.int32) + 0xFFFF) >> 16
    scale = rounded.to(torch.int16).view(torch.bfloat16).masked_fill(magnitude < _LEAST_MAGNITUDE, 0)
    scale.masked_fill_(~magnitude.isfinite(), torch.nan)
    is_scaled = scale > 0
    divisor = scale.float().masked_fill(~is_scaled, 1)
    numbers = (groups / divisor[..., None]).round().masked_fill(~is_scaled[..., None], 0)
    return torch.cat((numbers.to(torch.int8).flatten(-2)[..., :head_dim], scale.view(torch.int8)), -1)


def dequantize(heads: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Return int8 heads (..., `head_bytes`) as (..., head_dim) of `dtype`."""
    # A copy: a view of wider numbers has to start at a multiple of their size.
    scale = heads[..., head_dim:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    numbers = _to_groups(heads[..., :head_dim].float())
    return (numbers * scale[..., None]).flatten(-2)[..., :head_dim].to(dtype)


def _num_groups(head_dim: int) -> int:
    return -(-head_dim // GROUP)


def _to_groups(states: torch.Tensor) -> torch.Tensor:
    return pad(states, (0, -states.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
