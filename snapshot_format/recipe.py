"""Constants of the recipes that quantize a snapshot ahead of serving.

The storage initializer applies a recipe and the predictor accepts its result, so both must use the same values.
"""

from collections.abc import Mapping
from typing import Final, Literal

Variant = Literal["int8-cpu", "int4-cpu"]
"""A derived snapshot; its directory is `<commit>-<variant>`."""

INT8_CPU: Final = "int8-cpu"
"""The variant whose linear layers are quantized for the int8 kernels of a CPU."""

INT4_CPU: Final = "int4-cpu"
"""The variant whose linear layers are quantized for the int4 kernels of a CPU."""

RECIPE_VERSIONS: Mapping[str, int] = {INT8_CPU: 1, INT4_CPU: 1}
"""Version of each variant's recipe. Increase it whenever the same input gives other weights."""

INT8_METHOD = "kserve_llm_int8"
INT4_METHOD = "kserve_llm_int4"
"""`quant_method` of these weights in config.json."""

INT4_GROUP_SIZE = 32
"""Inputs of a layer that share a scale in 4 bits."""

MIN_SCALE = 1e-30
"""Lower bound of a scale, so that all-zero weights never divide by zero."""
