"""Merge a LoRA adapter, as PEFT saves it, into the weights of its base model.

The tensors of the checkpoint are changed while transformers reads them, so quantization and packing see the merged
weights: `W + scale * B @ A`, computed in float32 and rounded to the data type of W. A tensor-parallel rank reads and
merges its part.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from predictor.errors import UnsupportedModel
from predictor.models import checkpoint
from snapshot_format import model_files

logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."
_TENSOR = re.compile(
    re.escape(_PREFIX) + r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(\.weight)?)"
)
_USED = frozenset({"alpha_pattern", "fan_in_fan_out", "lora_alpha", "peft_type", "use_dora", "use_rslora"})
_IGNORED = frozenset(
    # Of the training; or, as modules and ranks, repeated by the names and shapes of the tensors.
    {"auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode"}
    | {"layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size"}
    | {"r", "rank_pattern", "revision", "runtime_config", "target_modules"}
)
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Other values initialize by changing the base model's weights, or are never relevant to a trained adapter.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "task_type": (None, "CAUSAL_LM"),
}
"""Accepted values of further fields; of those not listed here, only an empty one."""


@dataclass(frozen=True, slots=True)
class _Update:
    """The change of one module's weight."""

    a: torch.Tensor
    """(rank, inputs)"""
    b: torch.Tensor
    """(outputs, rank)"""
    scale: float
    magnitude: torch.Tensor | None
    """(outputs,): length of each row of the merged weight, with DoRA."""

    def apply(self, weight: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """Return some rows and columns of the merged weight, of those of the original; all columns with DoRA."""
        merged = (self.b[rows].float() @ self.a[:, columns].float()).mul_(self.scale).add_(weight)
        if self.magnitude is not None:
            merged *= (self.magnitude.flatten()[rows].float() / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)


@dataclass(frozen=True, slots=True)
class _MergedSlice:
    """A tensor of a safetensors file that is merged when it is read; the same interface."""

    original: Any
    update: _Update
    is_transposed: bool
    """Whether the tensor is (inputs, outputs)."""

    def get_shape(self) -> list[int]:
        """Return the shape of the tensor."""
        shape: list[int] = self.original.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Return the data type in the words of safetensors."""
        return str(self.original.get_dtype())

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read and merge a part: `...`, or a slice for each dimension."""
        whole = slice(None)
        first, second = (whole, whole) if index is ... else index
        rows, columns = (second, first) if self.is_transposed else (first, second)
        # DoRA divides each row by its length.
        read = columns if self.update.magnitude is None else whole
        weight = self.original[read, rows].T if self.is_transposed else self.original[rows, read]
        merged = self.update.apply(weight, rows, read)
        if read is not columns:
            merged = merged[:, columns]
        return (merged.T if self.is_transposed else merged).contiguous()


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that was read and checked, and its directory."""

    directory: Path
    base: str
    """Name of the base model according to the adapter; for information only."""
    updates: Mapping[str, _Update]
    """By name of the module."""
    is_transposed: bool
    """Whether the base model's weights are (inputs, outputs), as in GPT-2."""

    def merge(self, files: Iterable[Path]) -> dict[str, Any]:
        """Return the tensors of the base model's safetensors files, as slices to be read; some of them are merged.

        Raises:
            UnsupportedModel: the base model has no such module, or its weight has another shape.
        """
        tensors: dict[str, Any] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        for module, update in self.updates.items():
            name = self._find(tensors, module)
            shape = (update.b.shape[0], update.a.shape[1])
            original = tuple(tensors[name].get_shape())
            original = original[::-1] if self.is_transposed else original
            if original != shape:
                raise self._refusal(
                    f"its {module} is {_describe(shape)}, and that of the base model {_describe(original)}"
                )
            tensors[name] = _MergedSlice(tensors[name], update, self.is_transposed)
        logger.info("merging adapter %s into %d weights", self.directory, len(self.updates))
        return tensors

    def _find(self, tensors: Mapping[str, Any], module: str) -> str:
        # Some checkpoints have the names of the model without its output layer: h.0 for transformer.h.0.
        for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
            if name in tensors:
                return name
        raise self._refusal(f"it changes {module}, and the base model has no weights of that name, or shares them")

    def _refusal(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"The adapter in {self.directory} does not fit the base model: {reason}. It was trained on "
            f"{self.base or 'an unknown model'}: set --model_reference to that."
        )


def read(directory: Path) -> Adapter:
    """Read an adapter, and check that it can be merged.

    Raises:
        UnsupportedModel: a file is missing or damaged, or the adapter has a feature that is not supported.
    """
    config = checkpoint.read_json(directory / model_files.ADAPTER_CONFIG)
    path = directory / model_files.ADAPTER_WEIGHTS
    if not path.is_file():
        raise UnsupportedModel(f"{directory} has no {path.name}. Save the adapter again with PEFT, as safetensors.")
    checkpoint.check_file(path)
    _check_config(directory, config)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise _unsupported(directory, f"the tensor {name}")
        parts.setdefault(match["module"], {})[match["part"].split(".")[0]] = tensor
    updates = {module: _update(directory, config, module, tensors) for module, tensors in parts.items()}
    if not updates:
        raise UnsupportedModel(f"{path} has no tensors. Download the adapter again.")
    base = str(config.get("base_model_name_or_path") or "")
    logger.info("the adapter in %s names the base model %s", directory, base or "not")
    return Adapter(directory, base, updates, bool(config.get("fan_in_fan_out")))


def _check_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Check that every field that changes the merged weights is supported."""
    if config.get("peft_type") != "LORA":
        raise _unsupported(directory, f"peft_type {config.get('peft_type')}")
    if config.get("fan_in_fan_out") and config.get("use_dora"):
        raise _unsupported(directory, "use_dora with fan_in_fan_out")
    for name, value in config.items():
        if name in _USED or name in _IGNORED:
            continue
        is_accepted = value in _DEFAULTS[name] if name in _DEFAULTS else not value
        if not is_accepted:
            raise _unsupported(directory, f"{name} {value!r}")


def _update(directory: Path, config: Mapping[str, Any], module: str, tensors: Mapping[str, torch.Tensor]) -> _Update:
    a, b = tensors.get("lora_A"), tensors.get("lora_B")
    magnitude = tensors.get("lora_magnitude_vector")
    if a is None or b is None or (magnitude is None) == bool(config.get("use_dora")):
        raise UnsupportedModel(f"The adapter in {directory} has no complete weights of {module}. Download it again.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise _unsupported(directory, f"tensors of {module} with shapes {_describe(a.shape)} and {_describe(b.shape)}")
    rank = a.shape[0]
    alpha = _alpha(config, module)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return _Update(a, b, scale, magnitude)


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """Return the alpha of a module: of the first pattern that matches the end of its name, else the common one."""
    patterns = config.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return float(next(matching, config.get("lora_alpha", 8)))


def _describe(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _unsupported(directory: Path, feature: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The adapter in {directory} has {feature}, which is not supported. Merge it into its base model with PEFT's "
        "merge_and_unload, and serve the result."
    )
