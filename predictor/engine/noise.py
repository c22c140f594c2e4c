"""Noise from a counter: a function of a seed, a position in the sequence and an index, the same on every device.

So a sequence gets the same noise alone and in any batch, and again when it computes a position a second time.
"""

import torch

_BITS = 52
"""Random bits of a number; float64 has 53, of which one is for the half that keeps numbers from 0 and 1."""


def to_int64(value: int) -> int:
    """Return the signed integer with the last 64 bits of an integer of any size."""
    return (value + 2**63) % 2**64 - 2**63


_INCREMENT = to_int64(0x9E3779B97F4A7C15)
_STEPS = (30, to_int64(0xBF58476D1CE4E5B9)), (27, to_int64(0x94D049BB133111EB))


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Return the hash of 64-bit integers by SplitMix64's function, of which every bit depends on the whole value."""
    for shift, multiplier in _STEPS:
        # The shift of a negative integer fills with ones, which the mask removes. Products wrap on all devices.
        values = (values ^ ((values >> shift) & (2 ** (64 - shift) - 1))) * multiplier
    return values ^ ((values >> 31) & (2**33 - 1))


def keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return what `exponential` takes for a position of a sequence; all are int64."""
    return _mix(_mix(seeds) + positions * _INCREMENT)


def exponential(keys: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return independent exponentially distributed numbers, finite and above 0, as float64.

    The arguments are int64, of shapes that broadcast.
    """
    bits = _mix(keys + indices * _INCREMENT) & (2**_BITS - 1)
    return -((bits.double() + 0.5) * 2.0**-_BITS).log()
