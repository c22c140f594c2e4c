"""Quantization of weights to 4 bits, by the storage initializer or by the predictor, and their bytes; needs torch."""

import torch

from snapshot_format.recipe import INT4_GROUP_SIZE, MIN_SCALE

_ZERO_POINT = 8
_CHUNK_GROUPS = 1 << 13
"""Groups at a time: their copies in float32 stay in the CPU cache."""
_EXTREMES = (8.0, 7.3, 8.7)
"""Candidates for the integer that a group's weight of largest magnitude becomes, negated, before it is rounded."""


def pack(integers: torch.Tensor) -> torch.Tensor:
    """Pack (..., inputs), uint8 of 0 to 15, to (..., inputs / 2), uint8: the even input in the low half of a byte."""
    return integers[..., ::2] | integers[..., 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack (..., bytes), uint8, to (..., 2 x bytes), uint8 of 0 to 15: the reverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weights in groups of `INT4_GROUP_SIZE` inputs; each is worth (integer - 8) * scale.

    Args:
        weight: (outputs, inputs), floating point; inputs are whole groups.

    Returns:
        uint8 of `pack`, (outputs, inputs / 2); and scales (outputs, inputs / INT4_GROUP_SIZE), float32, which may be
        negative.
    """
    outputs, inputs = weight.shape
    groups = weight.reshape(-1, INT4_GROUP_SIZE)
    packed = torch.empty(len(groups), INT4_GROUP_SIZE // 2, dtype=torch.uint8)
    scale = torch.empty(len(groups), dtype=torch.float32)
    for start in range(0, len(groups), _CHUNK_GROUPS):
        chunk = slice(start, start + _CHUNK_GROUPS)
        integers, scale[chunk] = _quantize_groups(groups[chunk].float())
        packed[chunk] = pack(integers.add_(_ZERO_POINT).to(torch.uint8))
    return packed.view(outputs, inputs // 2), scale.view(outputs, inputs // INT4_GROUP_SIZE)


def _quantize_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers -8 to 7 and scales of groups (n, size): of the candidates those with the least squared error.

    The weight of largest magnitude becomes negative, because -8 has no positive counterpart. For the integers that a
    candidate gives, the scale is that of the least squares.
    """
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    largest = torch.where(largest.abs() < MIN_SCALE, MIN_SCALE, largest)
    relative = groups / largest
    best_integers, best_scale, best_gain = relative, largest, torch.full_like(largest, -1)
    for extreme in _EXTREMES:
        integers = relative.mul(-extreme).round_().clamp_(-8, 7)
        product = (relative * integers).sum(1, keepdim=True)
        square = integers.square().sum(1, keepdim=True).clamp_(min=1)
        scale = product / square
        gain = product * scale  # The squared error is the sum of squares without it.
        is_better = gain > best_gain
        best_integers = torch.where(is_better, integers, best_integers)
        best_scale = torch.where(is_better, scale, best_scale)
        best_gain = torch.maximum(gain, best_gain)
    return best_integers, (best_scale * largest)[:, 0]
