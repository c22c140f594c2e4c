"""Products with int8 weights, computed by `int8.c`, which is compiled where the package is built: see `hatch_build.py`.

Hands torch's tensors over; knows nothing of layers.
"""

import ctypes
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libint8.so")

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
_FUNCTIONS = {
    "int8_level": (_INT, []),
    "int8_packed_bytes": (_SIZE, [_SIZE] * 2),
    "int8_room_bytes": (_SIZE, [_SIZE] * 2),
    "int8_pack": (None, [_POINTER] * 2 + [_SIZE] * 2 + [_INT]),
    "int8_product": (None, [_POINTER] * 5 + [_FLOAT, _INT] + [_POINTER] * 3 + [_SIZE] * 3 + [_INT] * 2),
}
_LEVELS = (None, "avx512_vnni", "amx")


def _load() -> ctypes.CDLL | None:
    """After torch, whose OpenMP it calls."""
    if not LIBRARY.is_file():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        logger.warning("%s cannot be used: %s", LIBRARY, error)
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_library = _load()
level: str | None = _LEVELS[_library.int8_level()] if _library else None
"""What computes here: "amx", "avx512_vnni", or None if this CPU has neither or nothing was compiled for it."""


def pack(weight: torch.Tensor) -> torch.Tensor:
    """int8 weights (outputs, inputs) in the order in which `product` reads them: bytes, about as many."""
    outputs, inputs = weight.shape
    assert _library is not None
    packed = torch.empty(_library.int8_packed_bytes(outputs, inputs), dtype=torch.uint8)
    weight = weight.contiguous()
    _library.int8_pack(weight.data_ptr(), packed.data_ptr(), outputs, inputs, torch.get_num_threads())
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
    assert _library is not None
    rows = rows.contiguous()
    onto = None if onto is None else onto.contiguous()
    tokens, inputs = len(rows), rows.shape[1] // (2 if gated else 1)
    outputs = rows.new_empty(tokens, len(scales))
    room = torch.empty(_library.int8_room_bytes(tokens, inputs), dtype=torch.int8)
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
        room.data_ptr(),
        tokens,
        inputs,
        len(scales),
        _LEVELS.index(level),
        torch.get_num_threads(),
    )
    return outputs
