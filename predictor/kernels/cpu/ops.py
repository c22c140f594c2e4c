"""Python bindings of the C kernels in `predictor/kernels/csrc`, which `hatch_build.py` compiles into the wheel.

Call `bf16_*` only where `bf16_isa` is not None, other kernels where `cpu_isa` is not.
"""

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

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
    "int8_scaled_mm": (None, [_POINTER] * 5 + [_FLOAT, _INT] + [_POINTER] * 3 + [_SIZE] * 3 + [_INT] * 2),
    "bf16_packed_bytes": (_SIZE, [_SIZE] * 2),
    "bf16_scratch_bytes": (_SIZE, [_SIZE] * 2 + [_INT]),
    "bf16_pack_weight": (None, [_POINTER] * 2 + [_SIZE] * 2),
    "bf16_mm": (None, [_POINTER] * 4 + [_FLOAT, _INT] + [_POINTER] * 3 + [_SIZE] * 3 + [_INT] * 2),
    "int8_argmax_scratch_bytes": (_SIZE, [_SIZE] * 2 + [_INT]),
    "int8_argmax": (None, [_POINTER] * 6 + [_SIZE] * 3 + [_INT] * 2),
    "int4_packed_bytes": (_SIZE, [_SIZE] * 3 + [_INT]),
    "int4_scratch_bytes": (_SIZE, [_SIZE] * 3),
    "int4_pack_weight": (None, [_POINTER] * 4 + [_SIZE] * 3),
    "int4_scaled_mm": (None, [_POINTER] * 5 + [_FLOAT, _INT] + [_POINTER] * 3 + [_SIZE] * 4 + [_INT] * 3),
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

MIN_SCALE_EXPONENT = -100
"""Lower scales are zero: powers of two beyond float32 would not be finite."""


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


_library: Any
_library, _load_error = _load()
cpu_isa: str | None = CPU_ISAS[_library.cpu_isa()] if _library else None
"""Instruction set that the kernels use; None if this CPU supports none of them or the library is unavailable."""
bf16_isa: str | None = BF16_ISAS[_library.bf16_isa()] if _library else None
"""Instruction set that `bf16_mm` uses; None likewise."""


def unavailable_reason() -> str:
    """Why the kernels are unavailable on a CPU that supports them; empty otherwise."""
    return _load_error if torch.cpu.get_capabilities().get("avx512_vnni") else ""


def int8_pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack int8 weights (out_features, in_features) into the layout of `int8_scaled_mm`, in one thread."""
    out_features, in_features = weight.shape
    packed_weight = torch.empty(_library.int8_packed_bytes(out_features, in_features), dtype=torch.uint8)
    weight = weight.contiguous()
    _library.int8_pack_weight(weight.data_ptr(), packed_weight.data_ptr(), out_features, in_features)
    return packed_weight


def int8_scaled_mm(
    activations: torch.Tensor,
    packed_weight: torch.Tensor,
    weight_scales: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    silu_and_mul: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply float32 activations, quantized per token to int8, by packed int8 weights.

    Args:
        activations: (tokens, in_features), float32.
        packed_weight: from `int8_pack_weight`.
        weight_scales: (out_features,), float32.
        bias: (out_features,), float32.
        norm: weight (in_features,), float32, and epsilon of an RMSNorm applied first.
        silu_and_mul: activations are (tokens, 2 x in_features), gate and up. silu(gate) * up overwrites gate first.
        residual: added to the output, (tokens, out_features), float32.

    Returns:
        (tokens, out_features), float32.
    """
    activations = activations.contiguous()
    residual = None if residual is None else residual.contiguous()
    tokens, in_features = len(activations), activations.shape[1] // (2 if silu_and_mul else 1)
    output = torch.empty(tokens, len(weight_scales), dtype=torch.float32)
    scratch = torch.empty(_library.int8_scratch_bytes(tokens, in_features), dtype=torch.int8)
    _library.int8_scaled_mm(
        activations.data_ptr(),
        packed_weight.data_ptr(),
        weight_scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if norm is None else norm[0].data_ptr(),
        0.0 if norm is None else norm[1],
        silu_and_mul,
        None if residual is None else residual.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        tokens,
        in_features,
        len(weight_scales),
        CPU_ISAS.index(cpu_isa),
        torch.get_num_threads(),
    )
    return output


def int8_argmax(
    activations: torch.Tensor,
    packed_weight: torch.Tensor,
    weight_scales: torch.Tensor,
    num_outputs: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return which output of `int8_scaled_mm` is the largest, the first of equal ones, without writing the outputs.

    Args, in addition to those of `int8_scaled_mm`:
        num_outputs: number of outputs to look at, of which the first ones are.

    Returns:
        (tokens,), int64, as `argmax` of the outputs.
    """
    activations = activations.contiguous()
    tokens, in_features = activations.shape
    output = torch.empty(tokens, dtype=torch.int64)
    threads = torch.get_num_threads()
    scratch = torch.empty(_library.int8_argmax_scratch_bytes(tokens, in_features, threads), dtype=torch.int8)
    _library.int8_argmax(
        activations.data_ptr(),
        packed_weight.data_ptr(),
        weight_scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        tokens,
        in_features,
        num_outputs,
        CPU_ISAS.index(cpu_isa),
        threads,
    )
    return output


class Int4Weight(NamedTuple):
    """int4 weights in the layout of `int4_scaled_mm`."""

    packed: torch.Tensor
    """Weights, scales of groups and zero points, uint8."""
    scales: torch.Tensor
    """Of the outputs, (out_features,), float32; the scales of groups are relative to them."""
    group_size: int
    """Input features with the same scale and zero point: 32, 64 or 128."""
    has_zero_points: bool


def int4_pack_weight(
    qweight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int
) -> Int4Weight:
    """Pack int4 weights, in one thread. Scales are kept in float16, relative to a power of two per output.

    Args:
        qweight: (out_features, in_features), uint8, 0 to 15.
        scale: (out_features, groups), float32.
        zero_point: (out_features, groups), uint8, 0 to 15; None: 8.
        group_size: 32, 64 or 128. The last group may be shorter.
    """
    out_features, in_features = qweight.shape
    exponent = torch.frexp(scale.abs().amax(1)).exponent.clamp_(min=MIN_SCALE_EXPONENT)
    relative = torch.ldexp(scale, -exponent[:, None]).half().contiguous()
    packed = torch.empty(
        _library.int4_packed_bytes(out_features, in_features, group_size, zero_point is not None), dtype=torch.uint8
    )
    qweight = qweight.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    _library.int4_pack_weight(
        qweight.data_ptr(),
        relative.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        packed.data_ptr(),
        out_features,
        in_features,
        group_size,
    )
    return Int4Weight(packed, torch.ldexp(torch.ones(out_features), exponent), group_size, zero_point is not None)


def int4_scaled_mm(
    activations: torch.Tensor,
    weight: Int4Weight,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    silu_and_mul: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply float32 activations, quantized per token to int8, by packed int4 weights.

    Arguments and result are those of `int8_scaled_mm`, but for the weight.
    """
    activations = activations.contiguous()
    residual = None if residual is None else residual.contiguous()
    tokens, in_features = len(activations), activations.shape[1] // (2 if silu_and_mul else 1)
    output = torch.empty(tokens, len(weight.scales), dtype=torch.float32)
    scratch = torch.empty(_library.int4_scratch_bytes(tokens, in_features, weight.group_size), dtype=torch.int8)
    _library.int4_scaled_mm(
        activations.data_ptr(),
        weight.packed.data_ptr(),
        weight.scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if norm is None else norm[0].data_ptr(),
        0.0 if norm is None else norm[1],
        silu_and_mul,
        None if residual is None else residual.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        tokens,
        in_features,
        len(weight.scales),
        weight.group_size,
        weight.has_zero_points,
        CPU_ISAS.index(cpu_isa),
        torch.get_num_threads(),
    )
    return output


def bf16_pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack bfloat16 weights (out_features, in_features) into the layout of `bf16_mm`, in one thread."""
    out_features, in_features = weight.shape
    packed_weight = torch.empty(_library.bf16_packed_bytes(out_features, in_features), dtype=torch.uint8)
    weight = weight.contiguous()
    _library.bf16_pack_weight(weight.data_ptr(), packed_weight.data_ptr(), out_features, in_features)
    return packed_weight


def bf16_mm(
    activations: torch.Tensor,
    packed_weight: torch.Tensor,
    out_features: int,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    silu_and_mul: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply float32 activations by packed bfloat16 weights. Sums are float32.

    Args:
        activations: (tokens, in_features), float32. AMX and AVX512-BF16 round them to bfloat16.
        packed_weight: from `bf16_pack_weight`.
        out_features: of the weights.
        bias: (out_features,), float32.
        norm: weight (in_features,), float32, and epsilon of an RMSNorm applied first.
        silu_and_mul: activations are (tokens, 2 x in_features), gate and up; silu(gate) * up is multiplied.
        residual: added to the output, (tokens, out_features), float32.

    Returns:
        (tokens, out_features), float32.
    """
    isa = BF16_ISAS.index(bf16_isa)
    activations = activations.contiguous()
    residual = None if residual is None else residual.contiguous()
    tokens, in_features = len(activations), activations.shape[1] // (2 if silu_and_mul else 1)
    output = torch.empty(tokens, out_features, dtype=torch.float32)
    scratch = torch.empty(_library.bf16_scratch_bytes(tokens, in_features, isa), dtype=torch.uint8)
    _library.bf16_mm(
        activations.data_ptr(),
        packed_weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if norm is None else norm[0].data_ptr(),
        0.0 if norm is None else norm[1],
        silu_and_mul,
        None if residual is None else residual.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        tokens,
        in_features,
        out_features,
        isa,
        torch.get_num_threads(),
    )
    return output


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
    _library.rotate_to_bf16(
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
    _library.quantize_kv(
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
    _library.paged_attention(
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
