"""A directory of weights becomes a model on a device, with its tokenizer. Knows nothing of requests or HTTP."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from predictor.errors import UnsupportedModel
from predictor.kernels.cpu import decoder_layer, gemm, linear, ops
from predictor.models import placement, prefetch, snapshot
from predictor.models import quantization as quantizing
from predictor.resources import memory
from predictor.types import SamplingParams

logger = logging.getLogger(__name__)

WEIGHTS_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to generate, and what its directory says about how it wants to be used."""

    model: Any
    """The transformers model, in evaluation mode, on its device."""
    tokenizer: Any
    context_tokens: int
    """Positions that the model was made for."""
    vocabulary_tokens: int
    """Token ids are below this."""
    eos_token_ids: frozenset[int]
    quantization: str
    """`none`, `8bit` or `4bit`, or the method by which the checkpoint comes quantized."""
    int8_kernels: str
    """What computes 8 bits on a CPU: `amx`, `avx512_vnni` or `fbgemm`; empty where that is not done."""
    defaults: SamplingParams
    """From the generation config; greedy where that does not ask for sampling."""
    device_map: dict[str, str]
    """Where each part of the model lies, if that is more than one place; else empty."""
    prepared: bool = False
    """Whether its weights were rounded ahead of loading, by the storage initializer."""


def load(
    directory: Path,
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    quantization: str = "none",
    keep: Sequence[str] = (),
    fallback: bool = False,
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> LoadedModel:
    """Load the model and tokenizer of `directory`.

    Args:
        directory: holds config.json, *.safetensors and the tokenizer's files; never the Hub.
        device: "auto", "cuda", "cuda:1" and so on, "mps" or "cpu".
        dtype: "auto", "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code of the directory.
        quantization: "auto", "none", "8bit" or "4bit".
        keep: names, or parts of names, of linear layers whose weights are left as they are.
        fallback: leave the weights as they are where the quantization cannot be had.
        phase: entered for each part of the load, with its name: "tokenizer", "weights", "pack".

    Raises:
        UnsupportedModel: no weights that can be read, or an architecture that transformers does not know.
        StartupError: the device is not there, or cannot do the quantization.
    """
    transformers.utils.logging.disable_progress_bar()
    config = _config(directory, trust_remote_code)
    _check_weights(directory)
    target = placement.choose_device(device)
    number_format = choose_dtype(dtype, getattr(config, "dtype", None), target)
    of_checkpoint = getattr(config, "quantization_config", None)
    weights_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    free_bytes = memory.available_bytes(target)
    quantization = quantizing.choose(quantization, target, of_checkpoint, weights_bytes, free_bytes, fallback=fallback)
    fewer_bits = quantizing.config(quantization, target, number_format, keep)
    placed = placement.place(target, quantization, weights_bytes, free_bytes, _host_bytes)
    logger.info(
        "loading %s on %s in %s, quantization %s",
        directory,
        target,
        str(number_format).removeprefix("torch."),
        quantization,
    )
    ahead = _prepared(directory, fewer_bits, number_format)
    if ahead is not None:
        logger.info("taking what was rounded ahead, %s", ahead)
        directory, config, quantization, fewer_bits = ahead, _config(ahead, trust_remote_code), "none", None
    common = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        with phase("tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **common)
    except Exception as error:
        raise _not_loaded("tokenizer", directory, error) from error
    # To the end of packing: what is mapped may be touched there first.
    with prefetch.ahead(sorted(directory.glob("*.safetensors")), _host_bytes()):
        with phase("weights"):
            model = _weights(
                directory,
                config=config,
                dtype=number_format,
                device_map=placed.device_map,
                max_memory=placed.max_memory,
                quantization_config=fewer_bits,
                **common,
            )
        text_config = config.get_text_config()
        effective = _effective(model, quantization)
        int8_kernels = gemm.int8_backend() if effective == "8bit" and target.type == "cpu" else ""
        if target.type == "cpu":
            head = model.get_output_embeddings()
            rounds_head = effective == "8bit" and quantizing.rounds(model, head, keep)
            with phase("pack"):
                decoder_layer.fuse(model)
                linear.pack_linear_layers(model, head if rounds_head else None)
            if int8_kernels:
                logger.info("8 bits are computed by %s", int8_kernels)
            if ops.unavailable_reason():
                logger.warning("this CPU could be faster: %s", ops.unavailable_reason())
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        context_tokens=int(getattr(text_config, "max_position_embeddings", None) or tokenizer.model_max_length),
        vocabulary_tokens=int(text_config.vocab_size),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        quantization=effective,
        int8_kernels=int8_kernels,
        defaults=_defaults(model.generation_config),
        device_map=placement.describe(model),
        prepared=ahead is not None,
    )


def choose_dtype(dtype: str, of_checkpoint: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format asked for; "auto" keeps the checkpoint's own where the device computes in it well."""
    if dtype != "auto":
        return getattr(torch, dtype)
    chosen = of_checkpoint or torch.float32
    if device.type == "cpu" and chosen == torch.float16:
        return torch.bfloat16  # CPUs convert float16 for every operation; bfloat16 is as small
    if device.type == "cuda" and chosen == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        return torch.float16
    return chosen


def _weights(directory: Path, **options: Any) -> Any:
    """A model with all its weights from the directory.

    Raises:
        UnsupportedModel: they cannot be read, are not all there, or find no room.
    """
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            directory, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UnsupportedModel(
            f"The weights in {directory} find no room ({_first_line(error)}); give more memory, or fewer bits by "
            "--quantization."
        ) from error
    except Exception as error:
        raise _not_loaded("weights", directory, error) from error
    _check_filled(directory, told)
    return model


def _not_loaded(what: str, directory: Path, error: Exception) -> UnsupportedModel:
    """Of whatever transformers raises: it has no class for a file that it cannot use."""
    lacking = isinstance(error, ImportError)
    remedy = "add that to the image" if lacking else "download the model again if its files are damaged"
    return UnsupportedModel(f"The {what} in {directory} cannot be loaded ({_first_line(error)}); {remedy}.")


def _host_bytes() -> int:
    return memory.available_bytes(torch.device("cpu"))


def _prepared(directory: Path, fewer_bits: Any, number_format: torch.dtype) -> Path | None:
    """Where weights lie that are rounded already, as they would be here; None where they are not, or need not be."""
    if not isinstance(fewer_bits, quantizing.Int8Config):
        return None
    dtype = str(number_format).removeprefix("torch.")
    return snapshot.prepared(directory, dtype, fewer_bits.modules_to_not_convert or ())


def _config(directory: Path, trust_remote_code: bool) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # what the fields of a config can raise has no common class
        model_type = _declared(directory).get("model_type")
        if trust_remote_code or str(model_type) in CONFIG_MAPPING:
            raise UnsupportedModel(
                f"{directory / 'config.json'} cannot be used ({_first_line(error)}); download the model again."
            ) from error
        raise UnsupportedModel(
            f"{directory / 'config.json'} names the model type {model_type!r}, which transformers "
            f"{transformers.__version__} cannot serve without remote code; use a supported model, a newer "
            "transformers, or, if you have read its code, --trust_remote_code."
        ) from error
    has_remote_code = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not has_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        architecture = ", ".join(config.architectures or ()) or config.model_type
        raise UnsupportedModel(
            f"{directory} holds a {architecture}, which does not generate text; serve a causal language model."
        )
    return config


def _declared(directory: Path) -> dict[str, Any]:
    try:
        declared = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        declared = None
    if not isinstance(declared, dict):
        raise UnsupportedModel(f"{directory / 'config.json'} is no JSON object; download the model again.")
    return declared


def _check_weights(directory: Path) -> None:
    index = directory / WEIGHTS_INDEX
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, AttributeError) as error:
        raise UnsupportedModel(f"{index} is not a readable index; download the model again.") from error
    missing = sorted(shard for shard in named if not (directory / shard).is_file())
    if missing:
        raise UnsupportedModel(f"{directory} lacks {', '.join(missing)}, named in {WEIGHTS_INDEX}; download it again.")
    if not any(directory.glob("*.safetensors")):
        raise UnsupportedModel(
            f"{directory} has no *.safetensors; only that format is loaded, since pickled weights can run code: "
            "choose a model or revision that has it."
        )


def _check_filled(directory: Path, told: dict[str, Any]) -> None:
    """Transformers fills what the files lack, or have in another shape, with random numbers, and only logs it."""
    unlike = sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
    if unlike:
        more = f" and {len(unlike) - 1} more" if unlike[1:] else ""
        raise UnsupportedModel(
            f"The weights in {directory} do not fit its config.json (missing or of another shape: {unlike[0]}{more}); "
            "download the model again."
        )


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared, tokenizer.eos_token_id]
    return frozenset(token_id for token_id in ids if token_id is not None)


def _effective(model: Any, asked: str) -> str:
    of_checkpoint = getattr(model.config, "quantization_config", None) if asked == "none" else None
    method = asked if of_checkpoint is None else str(getattr(of_checkpoint, "quant_method", "unknown"))
    return "8bit" if method == quantizing.INT8 else method


def _defaults(config: Any) -> SamplingParams:
    repetition_penalty = 1.0 if config.repetition_penalty is None else float(config.repetition_penalty)
    greedy = SamplingParams(
        max_tokens=config.max_new_tokens, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=repetition_penalty
    )
    if not config.do_sample:
        return greedy
    return replace(
        greedy,
        temperature=1.0 if config.temperature is None else float(config.temperature),
        top_p=1.0 if config.top_p is None else float(config.top_p),
        top_k=config.top_k or 0,
    )


def _first_line(error: Exception) -> str:
    # Config classes wrap what a field is refused for.
    cause = error.__cause__ if isinstance(error.__cause__, ValueError | TypeError) else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
