"""How each variant quantizes the weights of a linear layer, rows of them at a time.

    int8-cpu   `<layer>.weight` int8 (outputs, inputs), `<layer>.scale` float32 (outputs,)
    int4-cpu   `<layer>.weight` uint8 (outputs, inputs / 2), `<layer>.scale` float32 (outputs, groups)

The predictor has the same rules for weights that it quantizes while loading. Layers whose inputs are not whole groups
are not quantized.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from snapshot_format import int4
from snapshot_format.recipe import INT4_CPU, INT4_GROUP_SIZE, INT4_METHOD, INT8_CPU, INT8_METHOD, MIN_SCALE, Variant


class Part(NamedTuple):
    """A stored tensor of a layer."""

    dtype: str
    """Safetensors' name of the dtype."""
    item_bytes: int
    shape: Callable[[int, int], tuple[int, ...]]
    """Of a layer's number of outputs and inputs."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights are quantized and stored."""

    method: str
    """`quant_method` in config.json."""
    weight: Part
    scale: Part
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """Returns both for rows of weights, (outputs, inputs)."""
    group_size: int = 1
    """The number of a layer's inputs is a multiple of it."""


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows of weights to int8, with a scale for each row.

    The scale is the row's largest magnitude, at least `MIN_SCALE`, divided by 127. Each weight becomes weight / scale,
    rounded half to even.

    Args:
        weight: (outputs, inputs), floating point.

    Returns:
        int8 weights (outputs, inputs), and scales (outputs,) in float32.
    """
    scale = torch.linalg.vector_norm(weight, torch.inf, dim=1).float().clamp(min=MIN_SCALE) / 127
    return weight.float().div_(scale[:, None]).round_().to(torch.int8), scale


RECIPES: Mapping[Variant, Recipe] = {
    INT8_CPU: Recipe(
        INT8_METHOD,
        Part("I8", 1, lambda outputs, inputs: (outputs, inputs)),
        Part("F32", 4, lambda outputs, _: (outputs,)),
        quantize_int8,
    ),
    INT4_CPU: Recipe(
        INT4_METHOD,
        Part("U8", 1, lambda outputs, inputs: (outputs, inputs // 2)),
        Part("F32", 4, lambda outputs, inputs: (outputs, inputs // INT4_GROUP_SIZE)),
        int4.quantize,
        INT4_GROUP_SIZE,
    ),
}
