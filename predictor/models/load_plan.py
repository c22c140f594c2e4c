"""Decide how a model is loaded, before any weight is read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from predictor.errors import InvalidSettings, UnsupportedModel
from predictor.kernels import tensor_parallel
from predictor.models import (
    adapter,
    architectures,
    checkpoint,
    context_length,
    int4_checkpoint_quantizer,
    placement,
    pooling,
    sharding,
    snapshot,
)
from predictor.models.adapter import Adapter
from predictor.models.checkpoint import Weights
from predictor.models.generation_config import GenerationConfig
from predictor.models.int4_quantizer import Int4Config
from predictor.models.int8_quantizer import Int8Config
from predictor.models.placement import Placement
from predictor.models.quantization import make_config, resolve_mode
from predictor.resources import memory
from predictor.types import Pooling, Task
from snapshot_format import model_files
from snapshot_format.recipe import INT4_CPU, INT8_CPU, Variant

logger = logging.getLogger(__name__)

_VARIANTS: Mapping[type, Variant] = {Int8Config: INT8_CPU, Int4Config: INT4_CPU}
"""What the storage initializer prepares for each config that quantizes on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Every decision of a load, made before any weight is read."""

    directory: Path
    config: Any
    """The transformers config in `weights_dir`."""
    generation_config: GenerationConfig
    device: torch.device
    dtype: torch.dtype
    quantization: str
    """Resolved mode."""
    quantization_config: Any | None
    """How transformers quantizes the weights while they load; None if it does not."""
    skip_modules: Sequence[str]
    placement: Placement
    prequantized_dir: Path | None
    """The variant of `directory` with these weights, made by the storage initializer."""
    trust_remote_code: bool
    context_tokens: int | None
    """Maximum of prompt and completion together; None: the tokenizer's."""
    pooling: Pooling | None
    """How texts are embedded or classified; None: the model generates."""
    adapter: Adapter | None
    """Merged into the weights while they load."""

    @property
    def weights_dir(self) -> Path:
        """Directory of the weights and the tokenizer."""
        return self.prequantized_dir or self.directory


class LoadOptions(TypedDict, total=False):
    """Options of `make_plan`."""

    device: str
    dtype: str
    trust_remote_code: bool
    quantization: str
    skip_modules: Sequence[str]
    fallback: bool
    max_model_len: int | None
    task: str
    adapter_dir: Path | None


def make_plan(
    directory: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantization: str = "none",
    skip_modules: Sequence[str] = (),
    fallback: bool = False,
    max_model_len: int | None = None,
    task: str = "auto",
    adapter_dir: Path | None = None,
) -> LoadPlan:
    """Decide how to load the model of `directory`.

    Args:
        directory: holds config.json, *.safetensors and the tokenizer's files; never the Hub.
        device: "auto", "cuda", "cuda:1" and so on, "mps" or "cpu".
        dtype: "auto", "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code of the directory.
        quantization: "auto", "none", "8bit", "4bit" or "fp8".
        skip_modules: names, or parts of names, of linear layers not to quantize.
        fallback: load without quantization if the device does not support it.
        max_model_len: maximum of prompt and completion together; None: the model's.
        task: "auto", "generate", "embed" or "classify".
        adapter_dir: holds a LoRA adapter to merge into the weights.

    Raises:
        UnsupportedModel: the weights or the adapter cannot be used, or the architecture cannot be served.
        InvalidSettings: `max_model_len` is more than the model supports, or the task excludes quantization.
        StartupError: the device is missing, too small, or does not support the quantization.
    """
    checkpoint.check_auxiliary_files(directory)
    config, chosen_task, weights = _read_checkpoint(directory, trust_remote_code=trust_remote_code, task=task)
    has_remote_code = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    sharding.check(config, directory, chosen_task, has_remote_code=has_remote_code)
    is_pooling = chosen_task is not Task.GENERATE
    if is_pooling:
        quantization = _without_quantization(quantization, fallback=fallback)
    context_tokens = context_length.resolve(config, directory, max_model_len)
    target = placement.choose_device(device)
    target_dtype = choose_dtype(dtype, getattr(config, "dtype", None), target)
    weight_bytes = weights.size_bytes // tensor_parallel.size()
    free_bytes = memory.available_bytes(target)
    checkpoint_config = getattr(config, "quantization_config", None)
    if target.type == "cpu":
        int4_checkpoint_quantizer.replace_method(config, directory, chosen_task)
    mode = resolve_mode(quantization, target, checkpoint_config, weight_bytes, free_bytes, fallback=fallback)
    quantization_config = make_config(mode, target, target_dtype, skip_modules)
    lora = None if adapter_dir is None else _read_adapter(adapter_dir, config, chosen_task)
    prequantized_dir = None
    variant = _VARIANTS.get(type(quantization_config))
    if variant is not None and lora is not None:
        logger.info("quantizing while loading: prequantized weights would not have the adapter")
    elif variant is not None:
        prequantized_dir = snapshot.prequantized(directory, variant, dtype_name(target_dtype), skip_modules)
    if prequantized_dir is not None:
        config, *_ = _read_checkpoint(prequantized_dir, trust_remote_code=trust_remote_code, task=task)
        quantization_config = None
    return LoadPlan(
        directory=directory,
        config=config,
        generation_config=GenerationConfig.read(directory),
        device=target,
        dtype=target_dtype,
        quantization=mode,
        quantization_config=quantization_config,
        skip_modules=skip_modules,
        placement=placement.place(
            target, mode, weight_bytes, free_bytes, lambda: memory.available_bytes(torch.device("cpu"))
        ),
        prequantized_dir=prequantized_dir,
        trust_remote_code=trust_remote_code,
        context_tokens=context_tokens,
        pooling=pooling.read(directory, config, chosen_task, is_causal=architectures.is_causal(config))
        if is_pooling
        else None,
        adapter=lora,
    )


def _without_quantization(quantization: str, *, fallback: bool) -> str:
    """Return the mode for models that embed or classify."""
    if quantization not in ("auto", "none") and not fallback:
        raise InvalidSettings(
            f"--quantization is {quantization}, but a model that embeds or classifies is served unquantized. "
            "Set --quantization none."
        )
    return "none"


def choose_dtype(dtype: str, checkpoint_dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Resolve a dtype; "auto" keeps the checkpoint's where the device computes efficiently in it."""
    if dtype != "auto":
        return getattr(torch, dtype)
    chosen = checkpoint_dtype or torch.float32
    if device.type == "cpu" and chosen == torch.float16:
        return torch.bfloat16  # CPUs convert float16 for every operation; bfloat16 has the same size
    if device.type == "cuda" and chosen == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        return torch.float16
    return chosen


def _read_checkpoint(directory: Path, *, trust_remote_code: bool, task: str) -> tuple[Any, Task, Weights]:
    """Return the config, which names the weights if transformers would not find them, the task and the weights."""
    if trust_remote_code:
        checkpoint.check_code(directory)
    config, chosen_task = checkpoint.read_config(directory, trust_remote_code=trust_remote_code, task=task)
    weights = checkpoint.find_weights(directory, getattr(config, "transformers_weights", None))
    if weights.entry not in (model_files.SINGLE, model_files.INDEX):
        config.transformers_weights = weights.entry
    return config, chosen_task, weights


def _read_adapter(directory: Path, config: Any, task: Task) -> Adapter:
    """Read an adapter for a model with a config.

    Raises:
        UnsupportedModel: the adapter is not supported, or the model's weights cannot be changed.
    """
    if task is not Task.GENERATE:
        raise UnsupportedModel(
            f"The adapter in {directory} cannot be merged into a model whose task is {task}. Merge it with PEFT's "
            "merge_and_unload, and serve the result."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"The adapter in {directory} cannot be merged into weights that are quantized. Use the original weights of "
            "the base model with --quantization."
        )
    if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        raise UnsupportedModel(
            f"The adapter in {directory} cannot be merged into a model with its own code. Merge it with PEFT's "
            "merge_and_unload, and serve the result."
        )
    return adapter.read(directory)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name as flags have it, `bfloat16`."""
    return str(dtype).removeprefix("torch.")
