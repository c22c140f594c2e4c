"""The weights of a snapshot rounded to int8 for the kernels of a CPU, piece by piece: the only importer of torch.

A linear layer gets one scale for each output, in float32: the largest of its weights without sign, at least 1e-30, over
127. Each weight becomes weight / scale, rounded half to even. `<layer>.weight` is int8 then, `<layer>.scale` stands
beside it, and config.json says so. All else is byte for byte as it was: embeddings, norms, biases, the last layer,
layers that share their weights, and those to be kept.

It is what the predictor makes of the same weights while it loads them, bit by bit. Before the rounding they are in the
number format in which it would compute: the one that config.json names, bfloat16 instead of float16.

At no time is more than a few rows of one tensor in memory. Nothing is written here: what is to be written, and where
it lies, is for others to say.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from storage_initializer.errors import RefusedSnapshot
from storage_initializer.sources.file_selection import CONFIG, INDEX, WEIGHTS

METHOD = "kserve_llm_int8"
"""What the predictor calls these weights in a config.json."""

_SINGLE = f"model{WEIGHTS}"
_SMALLEST = 1e-30
"""Instead of a scale of zero, for an output whose weights are all zero."""
_BLOCK_NUMBERS = 1 << 22
"""Of a tensor, read at once: 16 MiB in float32."""
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, slots=True)
class Draft:
    """A file that is to be written: its size is known before its content is."""

    path: str
    size_bytes: int
    chunks: Callable[[], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Rounded:
    """What a snapshot becomes."""

    dtype: str
    """In which its weights were rounded: `float32` or `bfloat16`."""
    drafts: tuple[Draft, ...]
    """Weights, their index if they have one, and config.json."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    """As safetensors call it."""
    shape: tuple[int, ...]
    item_bytes: int
    read: Callable[[Any], Iterator[Any]]
    """From an open file to pieces of this tensor."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


def plan(directory: Path, name: str, keep: Sequence[str]) -> Rounded:
    """Look at a snapshot and say what it becomes; reads no weights yet.

    Args:
        directory: where it lies.
        name: its reference, for the sentences.
        keep: patterns of layers that are not rounded, as transformers understands `modules_to_not_convert`.

    Raises:
        RefusedSnapshot: its weights cannot be rounded without running them.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model, dtype = _skeleton(directory, name)
    shards = _shards(directory, name)
    try:
        stored = {shard: _names(directory / shard) for shard in shards}
        rounded = _weights_to_round(model, keep, [each for names in stored.values() for each in names], name)
        tensors = {shard: tuple(_tensors(directory / shard, rounded, dtype)) for shard in shards}
    except SafetensorError as error:
        raise RefusedSnapshot(f"{name} has weights that cannot be read ({error}): download it again") from error
    drafts = [_weights(directory, shard, tensors[shard]) for shard in shards]
    if shards != [_SINGLE]:
        drafts.append(_index(directory, tensors))
    drafts.append(_config(directory, keep))
    return Rounded(str(dtype).removeprefix("torch."), tuple(drafts))


def _skeleton(directory: Path, name: str) -> tuple[Any, Any]:
    """The model without weights, since only its modules tell which of them to round, and the format to round in."""
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise RefusedSnapshot(f"{name} holds weights that are quantized already: leave out --prepare")
        dtype = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RefusedSnapshot(
            f"{name} is no language model that transformers {transformers.__version__} knows without remote code, "
            "so it cannot be prepared: leave out --prepare"
        ) from error
    return model, torch.bfloat16 if dtype == torch.float16 else dtype


def _shards(directory: Path, name: str) -> list[str]:
    """The files that transformers would load; a repository may hold the same weights once more under other names."""
    if (directory / _SINGLE).is_file():
        return [_SINGLE]
    try:
        return sorted(set(json.loads((directory / f"{_SINGLE}{INDEX}").read_bytes())["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise RefusedSnapshot(
            f"{name} has neither {_SINGLE} nor a readable {_SINGLE}{INDEX}, so it cannot be prepared: "
            "leave out --prepare"
        ) from error


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as opened:
        return list(opened.keys())


def _weights_to_round(model: Any, keep: Sequence[str], stored: Sequence[str], name: str) -> frozenset[str]:
    """The names, as they are stored, of the weights of all layers that are to be rounded."""
    left_alone = HfQuantizer.get_modules_to_not_convert(
        model, list(keep), model._keep_in_fp32_modules, add_default_skips=True
    )
    layers = [
        layer
        for layer, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(layer, left_alone)
    ]
    found: dict[str, str] = {}
    place = _places(model, layers)
    for each in stored:
        layer = place(each).removesuffix(".weight")
        if place(_beside(each)) == f"{layer}.scale":
            found[layer] = each
    if not layers or set(found) != set(layers):
        missing = sorted(set(layers) - set(found))
        why = f"{missing[0]} is put together of others while it is loaded" if missing else "no layer is linear"
        raise RefusedSnapshot(f"{name} cannot be prepared, since {why}: leave out --prepare")
    return frozenset(found.values())


def _places(model: Any, layers: Sequence[str]) -> Callable[[str], str]:
    """From a stored name to that of the parameter which it is loaded into as it is; empty if there is none."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    parameters = {**model.state_dict(), **{f"{layer}.scale": True for layer in layers}}

    def place(stored: str) -> str:
        parameter, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, parameters)
        return parameter if converter is None and parameter in parameters else ""

    return place


def _beside(weight: str) -> str:
    """The name of the scale that belongs to a weight."""
    return f"{weight.removesuffix('weight')}scale"


def _tensors(path: Path, rounded: frozenset[str], dtype: Any) -> Iterator[_Tensor]:
    """The tensors of a file as they will be, in an order in which each is aligned for the size of its numbers."""
    tensors = []
    with safe_open(path, "pt") as opened:
        names = opened.keys()
        for name in names:
            stored = opened.get_slice(name)
            shape = tuple(stored.get_shape())
            if name in rounded:
                tensors.append(_Tensor(name, "I8", shape, 1, partial(_read_as, _to_int8, name, dtype)))
                tensors.append(_Tensor(_beside(name), "F32", shape[:1], 4, partial(_read_as, _scale, name, dtype)))
            else:
                item_bytes = (stored[:0] if shape else opened.get_tensor(name)).element_size()
                tensors.append(_Tensor(name, stored.get_dtype(), shape, item_bytes, partial(_read, name)))
    # As a rule sizes are multiples of the alignment. By name, a scale is beside its weight, which is read from the disk
    # for both of them once.
    aligned = [one for one in tensors if one.size_bytes % _ALIGNMENT_BYTES == 0]
    odd = [one for one in tensors if one.size_bytes % _ALIGNMENT_BYTES]
    yield from sorted(aligned, key=lambda one: one.name)
    yield from sorted(odd, key=lambda one: (-one.item_bytes, one.name))


def _read(name: str, opened: Any) -> Iterator[Any]:
    stored = opened.get_slice(name)
    shape = stored.get_shape()
    if not shape:
        yield opened.get_tensor(name)
        return
    rows = max(1, _BLOCK_NUMBERS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield stored[start : start + rows]


def _read_as(what: Callable[[Any], Any], name: str, dtype: Any, opened: Any) -> Iterator[Any]:
    """What becomes of a weight, block by block: an output depends on its own row only."""
    for block in _read(name, opened):
        yield what(block.to(dtype))


def _scale(weight: Any) -> Any:
    """For weights (outputs, inputs) a scale (outputs,) in float32."""
    return torch.linalg.vector_norm(weight, torch.inf, dim=1).float().clamp(min=_SMALLEST) / 127


def _to_int8(weight: Any) -> Any:
    """Weights (outputs, inputs), divided by their scales in float32 and rounded."""
    return weight.float().div_(_scale(weight)[:, None]).round_().to(torch.int8)


def _weights(directory: Path, shard: str, tensors: Sequence[_Tensor]) -> Draft:
    """A file in safetensors' format, which that library itself writes of whole tensors only.

    Eight bytes say, in little endian, how long the header is; it is JSON, padded with blanks; then come the tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)

    def chunks() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        with safe_open(directory / shard, "pt") as opened:
            for tensor in tensors:
                for piece in tensor.read(opened):
                    yield piece.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return Draft(shard, 8 + len(text) + end, chunks)


def _index(directory: Path, tensors: Mapping[str, Sequence[_Tensor]]) -> Draft:
    path = f"{_SINGLE}{INDEX}"
    metadata = json.loads((directory / path).read_bytes()).get("metadata") or {}
    metadata["total_size"] = sum(tensor.size_bytes for group in tensors.values() for tensor in group)
    shard_of = {tensor.name: shard for shard, group in tensors.items() for tensor in group}
    return _json(path, {"metadata": metadata, "weight_map": dict(sorted(shard_of.items()))})


def _config(directory: Path, keep: Sequence[str]) -> Draft:
    fields = json.loads((directory / CONFIG).read_bytes())
    fields["quantization_config"] = {"quant_method": METHOD, "modules_to_not_convert": sorted(keep)}
    return _json(CONFIG, fields)


def _json(path: str, fields: object) -> Draft:
    text = f"{json.dumps(fields, indent=2)}\n".encode()
    return Draft(path, len(text), lambda: iter((text,)))
