"""Constants of the recipe that quantizes a snapshot ahead of serving.

The storage initializer applies the recipe and the predictor accepts its result, so both must use the same values.
"""

from typing import Final, Literal

Variant = Literal["int8-cpu"]
"""A derived snapshot; its directory is `<commit>-<variant>`."""

INT8_CPU: Final = "int8-cpu"
"""The variant whose linear layers are quantized for the int8 kernels of a CPU."""

RECIPE_VERSION = 1
"""Version of the `int8-cpu` recipe. Increase it whenever the same input gives other weights."""

INT8_METHOD = "kserve_llm_int8"
INT4_METHOD = "kserve_llm_int4"
"""`quant_method` of these weights in config.json."""

INT4_GROUP_SIZE = 32
"""Inputs of a layer that share a scale in 4 bits."""

MIN_SCALE = 1e-30
"""Lower bound of a scale, so that all-zero weights never divide by zero."""
