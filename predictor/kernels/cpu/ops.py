"""What is computed in C, for torch's tensors: `int8.c` and `paged.c`, compiled where the wheel is built.

Hands tensors over; knows nothing of layers or sequences. Nothing here may be called where `level` is None.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("libnative.so")

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
_FUNCTIONS = {
    "int8_level": (_INT, []),
    "int8_packed_bytes": (_SIZE, [_SIZE] * 2),
    "int8_scratch_bytes": (_SIZE, [_SIZE] * 2),
    "int8_pack": (None, [_POINTER] * 2 + [_SIZE] * 2),
    "int8_product": (None, [_POINTER] * 5 + [_FLOAT, _INT] + [_POINTER] * 3 + [_SIZE] * 3 + [_INT] * 2),
    "paged_attention": (
        None,
        [_POINTER, _SIZE, _POINTER, _POINTER, _SIZE] + [_POINTER] * 3 + [_SIZE] * 4 + [_FLOAT, _POINTER, _INT],
    ),
}
_LEVELS = (None, "avx512_vnni", "amx")


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none. After torch, whose OpenMP it calls."""
    if not LIBRARY.is_file():
        return None, f"{LIBRARY} is not there; build where there is a C compiler"
    if any(source.stat().st_mtime > LIBRARY.stat().st_mtime for source in LIBRARY.parent.glob("*.[ch]")):
        return None, f"{LIBRARY} is older than its sources; install again"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY} cannot be used ({error}); install again, with gcc"
    return library, ""


_library: Any
_library, _lack = _load()
level: str | None = _LEVELS[_library.int8_level()] if _library else None
"""What computes here: "amx", "avx512_vnni", or None if this CPU has neither or nothing was compiled for it."""


def lack() -> str:
    """Why this CPU is slower than it could be; empty where it is not."""
    return _lack if torch.cpu.get_capabilities().get("avx512_vnni") else ""


def pack(weight: torch.Tensor) -> torch.Tensor:
    """int8 weights (outputs, inputs) in the order in which `product` reads them, as bytes; by one thread."""
    outputs, inputs = weight.shape
    packed = torch.empty(_library.int8_packed_bytes(outputs, inputs), dtype=torch.uint8)
    weight = weight.contiguous()
    _library.int8_pack(weight.data_ptr(), packed.data_ptr(), outputs, inputs)
    return packed


def product(
    rows: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """(tokens, inputs) to (tokens, outputs), both float32, with the inputs rounded to int8 by a scale for each token.

    Args:
        rows: the inputs.
        packed: by `pack`.
        scales: of the weights, (outputs,), float32.
        bias: (outputs,), float32.
        norm: weight (inputs,), float32, and epsilon of a root-mean-square norm of each token, to be computed first.
        gated: rows are (tokens, 2 x inputs): silu of the first half times the second is computed first, in their place.
        onto: what the product is added to, (tokens, outputs), float32.
    """
    rows = rows.contiguous()
    onto = None if onto is None else onto.contiguous()
    tokens, inputs = len(rows), rows.shape[1] // (2 if gated else 1)
    outputs = torch.empty(tokens, len(scales), dtype=torch.float32)
    scratch = torch.empty(_library.int8_scratch_bytes(tokens, inputs), dtype=torch.int8)
    _library.int8_product(
        rows.data_ptr(),
        packed.data_ptr(),
        scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if norm is None else norm[0].data_ptr(),
        0.0 if norm is None else norm[1],
        gated,
        None if onto is None else onto.data_ptr(),
        outputs.data_ptr(),
        scratch.data_ptr(),
        tokens,
        inputs,
        len(scales),
        _LEVELS.index(level),
        torch.get_num_threads(),
    )
    return outputs


def attends(dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    """Whether `attention` computes heads of this kind."""
    return level is not None and dtype == torch.bfloat16 and heads <= 16 * key_heads and size in (32, 64, 96, 128)


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    tokens: torch.Tensor,
    places: torch.Tensor,
    spans: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of sequences with one query each, over keys and values where they lie in a cache.

    Args:
        queries: (tokens, heads, size), bfloat16; those of other sequences may be among them.
        keys: the cache, (places, key heads, size), bfloat16.
        values: as `keys`.
        tokens: the place of each sequence's query, (sequences,), int64.
        places: in the cache, of the keys of all sequences, int64.
        spans: from where to where among those a sequence's own are, (sequences, 2), int64.
        scaling: of the scores.

    Returns:
        (sequences, heads, size), float32.
    """
    _, heads, size = queries.shape
    if queries.stride()[1:] != (size, 1):
        queries = queries.contiguous()
    outputs = torch.empty(len(tokens), heads, size, dtype=torch.float32)
    _library.paged_attention(
        queries.data_ptr(),
        queries.stride(0),
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        places.data_ptr(),
        spans.data_ptr(),
        tokens.data_ptr(),
        len(tokens),
        heads,
        keys.shape[1],
        size,
        scaling,
        outputs.data_ptr(),
        torch.get_num_threads(),
    )
    return outputs
