"""Quantization of a checkpoint for the CPU kernels, tensor by tensor, by the recipe of a variant.

Each weight of a linear layer becomes the tensors of the recipe, and config.json contains a `quantization_config`.
Embeddings, norms, biases, the last layer, tied weights and skipped modules are copied byte for byte.

The result is bit-identical to the predictor's own quantization while loading. Weights are first cast to the dtype in
which the predictor would compute: that of config.json, or bfloat16 instead of float16.

At most a few rows of one tensor are in memory at a time. This module plans files and generates their content; the
caller writes them.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from snapshot_format import model_files
from snapshot_format.model_files import CONFIG, INDEX
from snapshot_format.recipe import Variant
from storage_initializer.errors import RefusedSnapshot
from storage_initializer.prepare import transformers_mapping
from storage_initializer.prepare.recipes import RECIPES, Recipe

_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to write, whose size is known in advance."""

    path: str
    size_bytes: int
    chunks: Callable[[], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """The plan of a quantized checkpoint."""

    dtype: str
    """The dtype before quantization, `float32` or `bfloat16`."""
    files: tuple[OutputFile, ...]
    """Weights, their index if they have one, and config.json."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    """Safetensors' name of the dtype."""
    shape: tuple[int, ...]
    item_bytes: int
    read: Callable[[Any], Iterator[Any]]
    """Reads the tensor in blocks of rows from an open file."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


def plan(
    variant: Variant, directory: Path, name: str, skip_modules: Sequence[str], block_elements: int = 1 << 22
) -> QuantizedCheckpoint:
    """Plan the quantization of a snapshot without reading its weights.

    Args:
        variant: to be derived.
        directory: the snapshot.
        name: its reference, for error messages.
        skip_modules: patterns of layers not to quantize, as in transformers' `modules_to_not_convert`.
        block_elements: elements of a tensor that are in memory at a time. Default: 16 MiB in float32.

    Raises:
        RefusedSnapshot: its weights cannot be quantized without loading the model.
    """
    recipe = RECIPES[variant]
    model, dtype = _meta_model(directory, name)
    entry = _find_entry(directory, name)
    shards = _shards(directory, entry, name)
    try:
        stored = {shard: _tensor_names(directory / shard) for shard in shards}
        names = [tensor for tensors in stored.values() for tensor in tensors]
        layers = transformers_mapping.linear_layers(model, skip_modules, recipe.group_size)
        quantized = _quantized_weights(model, layers, names, name)
        tensors = {
            shard: tuple(_tensors(directory / shard, recipe, quantized, dtype, block_elements)) for shard in shards
        }
    except SafetensorError as error:
        raise RefusedSnapshot(f"{name} has unreadable weights ({error}). Download it again.") from error
    files = [_weights_file(directory, shard, tensors[shard]) for shard in shards]
    if entry == INDEX:
        files.append(_index_file(directory, tensors))
    files.append(_config_file(directory, recipe, skip_modules))
    return QuantizedCheckpoint(str(dtype).removeprefix("torch."), tuple(files))


def _meta_model(directory: Path, name: str) -> tuple[Any, Any]:
    """Return the model without weights, and the dtype before quantization."""
    try:
        config = transformers_mapping.load_config(directory)
        if getattr(config, "quantization_config", None) is not None:
            raise RefusedSnapshot(f"{name} is already quantized. Remove --prepare.")
        dtype = getattr(config, "dtype", None) or torch.float32
        model = transformers_mapping.build_meta_model(config)
    except transformers_mapping.UnsupportedModel as error:
        raise RefusedSnapshot(
            f"{name} is not a language model that transformers {transformers_mapping.VERSION} supports without remote "
            "code, so it cannot be prepared. Remove --prepare."
        ) from error
    return model, torch.bfloat16 if dtype == torch.float16 else dtype


def _find_entry(directory: Path, name: str) -> str:
    """Return the file that transformers would open first; a repository may contain the weights again elsewhere."""
    entry = model_files.find_weights(path.name for path in directory.iterdir() if path.is_file())
    if entry is None:
        raise RefusedSnapshot(f"{name} has no weights as safetensors, so it cannot be prepared. Remove --prepare.")
    return entry


def _shards(directory: Path, entry: str, name: str) -> tuple[str, ...]:
    if entry != INDEX:
        return (entry,)
    try:
        return model_files.read_index((directory / INDEX).read_bytes())
    except ValueError as error:
        raise RefusedSnapshot(f"{name} has an unreadable {INDEX} ({error}). Remove --prepare.") from error


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, "pt") as opened:
        return list(opened.keys())


def _quantized_weights(model: Any, layers: Sequence[str], stored: Sequence[str], name: str) -> frozenset[str]:
    """Return the stored names of the weights of layers."""
    parameter_name = transformers_mapping.parameter_mapping(model, {f"{layer}.scale": True for layer in layers})
    weights: dict[str, str] = {}
    for tensor in stored:
        layer = parameter_name(tensor).removesuffix(".weight")
        if parameter_name(_scale_name(tensor)) == f"{layer}.scale":
            weights[layer] = tensor
    if not layers:
        raise RefusedSnapshot(f"{name} cannot be prepared: it has no linear layers to quantize. Remove --prepare.")
    if missing := sorted(set(layers) - set(weights)):
        raise RefusedSnapshot(
            f"{name} cannot be prepared: transformers assembles {missing[0]} from other tensors while loading. "
            "Remove --prepare."
        )
    return frozenset(weights.values())


def _scale_name(weight: str) -> str:
    """Return the name of a weight's scale."""
    return f"{weight.removesuffix('weight')}scale"


def _tensors(
    path: Path, recipe: Recipe, quantized: frozenset[str], dtype: Any, block_elements: int
) -> Iterator[_Tensor]:
    """Iterate over the output tensors of a file, in an order that aligns each to its element size."""
    tensors = []
    with safe_open(path, "pt") as opened:
        names = opened.keys()
        for name in names:
            stored = opened.get_slice(name)
            shape = tuple(stored.get_shape())
            read = partial(_read, name, block_elements)
            if name in quantized:
                parts = ((name, recipe.weight), (_scale_name(name), recipe.scale))
                for index, (stored_name, part) in enumerate(parts):
                    read_part = partial(_read_quantized, read, recipe, dtype, index)
                    tensors.append(_Tensor(stored_name, part.dtype, part.shape(*shape), part.item_bytes, read_part))
            else:
                item_bytes = (stored[:0] if shape else opened.get_tensor(name)).element_size()
                tensors.append(_Tensor(name, stored.get_dtype(), shape, item_bytes, read))
    # Sizes are usually multiples of the alignment. Sorted by name, a scale is next to its weight,
    # which is then read from the disk once for both.
    aligned = [tensor for tensor in tensors if tensor.size_bytes % _ALIGNMENT_BYTES == 0]
    odd = [tensor for tensor in tensors if tensor.size_bytes % _ALIGNMENT_BYTES]
    yield from sorted(aligned, key=lambda tensor: tensor.name)
    yield from sorted(odd, key=lambda tensor: (-tensor.item_bytes, tensor.name))


def _read(name: str, block_elements: int, opened: Any) -> Iterator[Any]:
    stored = opened.get_slice(name)
    shape = stored.get_shape()
    if not shape:
        yield opened.get_tensor(name)
        return
    rows = max(1, block_elements // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield stored[start : start + rows]


def _read_quantized(
    read: Callable[[Any], Iterator[Any]], recipe: Recipe, dtype: Any, index: int, opened: Any
) -> Iterator[Any]:
    """Iterate over blocks of quantized weights (index 0) or scales (index 1); rows are independent."""
    for block in read(opened):
        yield recipe.quantize(block.to(dtype))[index]


def _weights_file(directory: Path, shard: str, tensors: Sequence[_Tensor]) -> OutputFile:
    """Return a file in the safetensors format; the library itself can only write whole tensors.

    Eight little-endian bytes contain the length of the header. The header is JSON, padded with blanks.
    The tensors follow.
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
                for block in tensor.read(opened):
                    yield block.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return OutputFile(shard, 8 + len(text) + end, chunks)


def _index_file(directory: Path, tensors: Mapping[str, Sequence[_Tensor]]) -> OutputFile:
    metadata = json.loads((directory / INDEX).read_bytes()).get("metadata") or {}
    metadata["total_size"] = sum(tensor.size_bytes for group in tensors.values() for tensor in group)
    shard_of = {tensor.name: shard for shard, group in tensors.items() for tensor in group}
    return _json_file(INDEX, {"metadata": metadata, "weight_map": dict(sorted(shard_of.items()))})


def _config_file(directory: Path, recipe: Recipe, skip_modules: Sequence[str]) -> OutputFile:
    fields = json.loads((directory / CONFIG).read_bytes())
    fields["quantization_config"] = {"quant_method": recipe.method, "modules_to_not_convert": sorted(skip_modules)}
    return _json_file(CONFIG, fields)


def _json_file(path: str, fields: object) -> OutputFile:
    text = f"{json.dumps(fields, indent=2)}\n".encode()
    return OutputFile(path, len(text), lambda: iter((text,)))
