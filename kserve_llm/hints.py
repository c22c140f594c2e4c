"""Hints after the first start of a model: what would be faster on this machine, from facts about it."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kserve_llm.flags import value

INT8_FLAGS = frozenset({"avx512_vnni", "amx_int8"})
"""Flags of a CPU with the kernels for 8 bits, in /proc/cpuinfo."""
NVIDIA_DEVICE = Path("/dev/nvidiactl")
"""Device of NVIDIA's driver."""
PARTS_IN_INT8 = {"float32": "a quarter", "float16": "half", "bfloat16": "half"}
"""Bytes of a weight of 8 bits, as a part of those of each dtype."""


def hints(model: str, properties: Mapping[str, str], flags: Sequence[str]) -> Iterator[str]:
    """Yield hints, each a sentence or two.

    Args:
        model: argument of the command.
        properties: of the served model, as its metadata has them.
        flags: of the predictor; what they set was chosen.
    """
    if properties.get("device") != "cpu":
        return
    if NVIDIA_DEVICE.exists() and value(flags, "device") is None:
        yield "This machine has an NVIDIA GPU, which this build of torch does not use. Install torch's CUDA build."
    part = PARTS_IN_INT8.get(properties.get("dtype", ""))
    # Models that embed or classify are served unquantized.
    generates = properties.get("task") == "generate"
    is_plain = properties.get("quantization") == "none" and value(flags, "quantization") is None
    if part and generates and is_plain and INT8_FLAGS & set(cpu_flags()):
        yield (
            f"This CPU has kernels for 8 bits: with --quantization 8bit a token reads {part} of the bytes of "
            f"weights. Compare: kserve-llm bench {model}, and kserve-llm bench {model} --quantization 8bit"
        )


def cpu_flags() -> list[str]:
    """Return the instruction sets of this CPU; none where Linux does not list them."""
    if platform.machine() != "x86_64":
        return []
    try:
        return Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return []
