"""The library of C kernels in `predictor/kernels/csrc`, which `hatch_build.py` compiles into the wheel.

Also the Python bindings of rotary embeddings and attention; those of linear layers are in `gemm_ops`. Call kernels of
bfloat16 weights only where `bf16_isa` is not None, others where `cpu_isa` is not.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

from predictor.kernels import int8_heads

LIBRARY = Path(__file__).with_name("libnative.so")
SOURCES = LIBRARY.parents[1] / "csrc"

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
PROTOTYPES = {
    "cpu_isa": (_INT, []),
    "bf16_isa": (_INT, []),
    "int8_packed_bytes": (_SIZE, [_SIZE] * 2),
    "int8_scratch_bytes": (_SIZE, [_SIZE] * 2),
    "int8_pack_weight": (None, [_POINTER] * 2 + [_SIZE] * 2),
    "int8_scaled_mm": (None, [_POINTER] * 3 + [_INT]),
    "bf16_packed_bytes": (_SIZE, [_SIZE] * 2),
    "bf16_scratch_bytes": (_SIZE, [_SIZE] * 2 + [_INT]),
    "bf16_pack_weight": (None, [_POINTER] * 2 + [_SIZE] * 2),
    "bf16_mm": (None, [_POINTER] * 2 + [_INT]),
    "int8_argmax_scratch_bytes": (_SIZE, [_SIZE] * 2 + [_INT]),
    "int8_argmax": (None, [_POINTER] * 4 + [_INT]),
    "int4_packed_bytes": (_SIZE, [_SIZE] * 3 + [_INT]),
    "int4_scratch_bytes": (_SIZE, [_SIZE] * 3),
    "int4_pack_weight": (None, [_POINTER] * 4 + [_SIZE] * 3),
    "int4_scaled_mm": (None, [_POINTER] * 3 + [_SIZE] + [_INT] * 2),
    "rotate_to_bf16": (None, [_POINTER] * 4 + [_SIZE] * 5 + [_INT]),
    "quantize_kv": (None, [_POINTER] * 2 + [_SIZE] * 2 + [_POINTER] + [_SIZE] * 3 + [_INT] * 2),
    "paged_attention": (
        None,
        [_POINTER] * 3
        + [_SIZE] * 3
        + [_POINTER] * 2
        + [_SIZE]
        + [_POINTER] * 3
        + [_SIZE] * 5
        + [_FLOAT] * 2
        + [_POINTER] * 2
        + [_INT] * 3,
    ),
}
"""Result and argument types of the functions in `kernels.h`."""
CPU_ISAS = (None, "avx512_vnni", "amx")
"""Instruction sets, in the order of the `ISA_*` constants in `kernels.h`."""
BF16_ISAS = (None, "avx512", "avx512_bf16", "amx")
"""Instruction sets of `bf16_mm`, in the order of the `BF16_ISA_*` constants."""
ATTENTION_ROWS = 96
"""Queries x heads of a KV head that `paged_attention` computes together, `MAX_ROWS` in `paged_attention.c`."""


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Load the library, or return why it is unavailable. torch must be imported first: its OpenMP is used."""
    if not LIBRARY.is_file():
        return None, f"{LIBRARY} does not exist; build the package with a C compiler"
    if any(source.stat().st_mtime > LIBRARY.stat().st_mtime for source in SOURCES.glob("*.[ch]")):
        return None, f"{LIBRARY} is older than its sources; install the package again"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY} cannot be loaded ({error}); install the package again, with gcc"
    return library, ""


library: Any
library, _load_error = _load()
cpu_isa: str | None = CPU_ISAS[library.cpu_isa()] if library else None
"""Instruction set that the kernels use; None if this CPU supports none of them or the library is unavailable."""
bf16_isa: str | None = BF16_ISAS[library.bf16_isa()] if library else None
"""Instruction set that `bf16_mm` uses; None likewise."""


def unavailable_reason() -> str:
    """Why the kernels are unavailable on a CPU that supports them; empty otherwise."""
    return _load_error if torch.cpu.get_capabilities().get("avx512_vnni") else ""


def rotate_to_bf16(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_rotated_heads: int) -> torch.Tensor:
    """Rotate the first heads of each token by its position, and convert all heads to bfloat16.

    Args:
        heads: (tokens, heads, head_dim), float32.
        cos: (tokens, rotated features), float32; further features are not rotated.
        sin: as `cos`, with the first half negated.
        num_rotated_heads: number of heads to rotate.

    Returns:
        (tokens, heads, head_dim), bfloat16.
    """
    heads, cos, sin = heads.contiguous(), cos.contiguous(), sin.contiguous()
    output = torch.empty_like(heads, dtype=torch.bfloat16)
    library.rotate_to_bf16(
        heads.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        output.data_ptr(),
        *heads.shape[:2],
        num_rotated_heads,
        heads.shape[2],
        cos.shape[1],
        torch.get_num_threads(),
    )
    return output


def supports_paged_attention(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether `paged_attention` computes heads of this shape and dtype on this CPU."""
    supports_shape = num_heads <= ATTENTION_ROWS * num_kv_heads and head_dim % 16 == 0 and head_dim <= 256
    return cpu_isa is not None and dtype in (torch.bfloat16, torch.float32) and supports_shape


def quantize_kv(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Quantize keys and values to int8 heads, each token by itself; `int8_heads.quantize` computes the same.

    Args:
        key: (tokens, num_kv_heads, head_dim), bfloat16 or float32.
        value: as `key`.

    Returns:
        Both, (2, tokens, num_kv_heads, `int8_heads.head_bytes`), int8.
    """
    tokens, num_kv_heads, head_dim = key.shape
    key, value = (states if states.stride()[1:] == (head_dim, 1) else states.contiguous() for states in (key, value))
    output = torch.empty(2, tokens, num_kv_heads, int8_heads.head_bytes(head_dim), dtype=torch.int8)
    library.quantize_kv(
        key.data_ptr(),
        value.data_ptr(),
        key.stride(0),
        value.stride(0),
        output.data_ptr(),
        tokens,
        num_kv_heads,
        head_dim,
        key.dtype == torch.float32,
        torch.get_num_threads(),
    )
    return output


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    slot_mapping: torch.Tensor,
    sequences: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute causal attention of a step's tokens to those before the step, in a paged cache, and to those of it.

    The result of a query is bit-identical in any step and tile.

    Args:
        query: (tokens, num_heads, head_dim), bfloat16 or float32.
        key: of the same tokens, (tokens, num_kv_heads, head_dim), of the same dtype; or int8 heads of `quantize_kv`.
        value: as `key`.
        key_cache: of the form of `key`, (slots, num_kv_heads, head_dim).
        value_cache: as `key_cache`.
        slot_mapping: cache slots of the keys before the step of all sequences, int64.
        sequences: (sequences, 4), int64: the index of the sequence's first token in `query`; the number of its tokens
            before the step; the position of the first of them whose key is read; the index of its slot in
            `slot_mapping`, in which the later ones follow.
        tiles: queries that are computed together, (tiles, 3), int64: the index of their sequence, the number of its
            tokens of the step before them, and their own number, at most `ATTENTION_ROWS` // (num_heads //
            num_kv_heads). Tokens without a tile have an arbitrary result.
        scale: factor of the scores.
        window: number of keys that a query attends to, its own included; None: all.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: for each head, a score of a key without a value, (num_heads,), float32.

    Returns:
        (tokens, num_heads, head_dim), float32.
    """
    tokens, num_heads, head_dim = query.shape
    query, key, value = (
        states if states.stride()[1:] == (states.shape[2], 1) else states.contiguous() for states in (query, key, value)
    )
    output = torch.empty(tokens, num_heads, head_dim, dtype=torch.float32)
    library.paged_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        query.stride(0),
        key.stride(0),
        value.stride(0),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        key_cache.stride(0),
        slot_mapping.data_ptr(),
        sequences.data_ptr(),
        tiles.data_ptr(),
        len(tiles),
        num_heads,
        key.shape[1],
        head_dim,
        window or 0,
        scale,
        softcap or 0.0,
        None if sinks is None else sinks.data_ptr(),
        output.data_ptr(),
        query.dtype == torch.float32,
        key.dtype == torch.int8,
        torch.get_num_threads(),
    )
    return output
