"""Load a model and its tokenizer as planned; on a CPU, fuse and pack its layers."""

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Unpack

import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from predictor.errors import UnsupportedModel
from predictor.kernels import tensor_parallel
from predictor.kernels.cpu import decoder_layer, experts, gemm, linear, ops
from predictor.kernels.cpu.layer_table import are_experts
from predictor.models import (
    architectures,
    checkpoint,
    context_length,
    int4_checkpoint,
    int4_checkpoint_quantizer,
    placement,
    rope,
)
from predictor.models.linear_quantizer import is_skipped
from predictor.models.load_plan import LoadOptions, LoadPlan, dtype_name, make_plan
from predictor.models.quantization import should_quantize
from predictor.resources import memory
from predictor.types import Pooling, SamplingParams, Task
from snapshot_format.recipe import INT4_METHOD, INT8_METHOD

logger = logging.getLogger(__name__)

T = TypeVar("T")

WEIGHTS_BAR = "Loading weights"
"""Description of transformers' progress bar over the weights' tensors."""
_INT8_LM_HEAD = ("8bit", "4bit", *int4_checkpoint.METHODS)
"""Quantizations on a CPU whose output layer is quantized to int8 at load."""
_NAMED_TOKENS = 5
"""Number of tokens without an embedding that the log names."""

TimePhase = Callable[[str], AbstractContextManager[object]]
"""Entered for each phase of a load, with its name: "tokenizer", "weights", "pack"."""

ReportWeights = Callable[[float], None]
"""Called with the fraction of the weights' tensors that are loaded, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to generate, and the defaults of its directory."""

    model: Any
    """The transformers model, in evaluation mode, on its device."""
    tokenizer: Any
    context_tokens: int
    """Maximum of prompt and completion together."""
    vocabulary_tokens: int
    """Rows of the input embedding, with padding: token ids are below this."""
    unembedded_tokens: dict[int, str]
    """Tokens of the tokenizer whose id has no row in the embedding, by id; prompts with them are refused."""
    eos_token_ids: frozenset[int]
    quantization: str
    """`none`, `8bit`, `4bit` or `fp8`, or the method of a quantized checkpoint."""
    int8_kernels: str
    """Backend of layers with 8-bit activations on a CPU: `amx`, `avx512_vnni` or `fbgemm`; else empty."""
    defaults: SamplingParams
    """From the generation config; greedy unless that enables sampling."""
    device_map: dict[str, str]
    """Device of each part of the model if there are several; else empty."""
    prequantized: bool
    """Whether the storage initializer quantized the weights."""
    pooling: Pooling | None = None
    """How texts are embedded or classified; None: the model generates."""


def load(
    directory: Path,
    *,
    time_phase: TimePhase = nullcontext,
    report_weights: ReportWeights | None = None,
    **options: Unpack[LoadOptions],
) -> LoadedModel:
    """Load the model and tokenizer of `directory`, with the options of `make_plan`."""
    with checkpoint.without_byte_order_marks(directory) as readable:
        return execute(make_plan(readable, **options), time_phase=time_phase, report_weights=report_weights)


def execute(
    plan: LoadPlan, *, time_phase: TimePhase = nullcontext, report_weights: ReportWeights | None = None
) -> LoadedModel:
    """Load the tokenizer and the weights; on a CPU, fuse and pack the layers.

    Raises:
        UnsupportedModel: the tokenizer or the weights cannot be read, are incomplete, or do not fit in memory.
    """
    transformers.utils.logging.disable_progress_bar()
    logger.info(
        "loading %s on %s in %s, quantization %s",
        plan.directory,
        plan.device,
        dtype_name(plan.dtype),
        plan.quantization,
    )
    if plan.prequantized_dir is not None:
        logger.info("loading pre-quantized weights from %s", plan.prequantized_dir)
    with time_phase("tokenizer"):
        tokenizer = _load_tokenizer(plan)
        context_tokens = plan.context_tokens or context_length.from_tokenizer(tokenizer, plan.directory)
    with time_phase("weights"), _progress_bars_report(report_weights):
        model = _load_weights(plan)
    if context_length.needs_fixed_rope(plan.config, context_tokens):
        rope.fix_length(model, context_tokens)
    if plan.pooling is not None:
        return _pooling_model(plan, plan.pooling, model, tokenizer, context_tokens)
    quantization = _resolved_method(model, plan.quantization)
    int8_kernels = ""
    if plan.device.type == "cpu":
        with time_phase("pack"):
            _pack(model, quantization, plan.skip_modules)
        if quantization in _INT8_LM_HEAD:
            int8_kernels = gemm.int8_backend()
            logger.info("int8 kernels: %s", int8_kernels)
        if reason := ops.unavailable_reason():
            logger.warning("native CPU kernels are unavailable: %s", reason)
    # Not the config's `vocab_size`: the embedding may be padded, or have fewer rows than the tokenizer has tokens.
    vocabulary_tokens = int(model.get_input_embeddings().weight.shape[0])
    eos_token_ids = plan.generation_config.eos_token_ids(tokenizer, vocabulary_tokens)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        context_tokens=context_tokens,
        vocabulary_tokens=vocabulary_tokens,
        unembedded_tokens=_unembedded_tokens(tokenizer, vocabulary_tokens),
        eos_token_ids=eos_token_ids,
        quantization=quantization,
        int8_kernels=int8_kernels,
        defaults=plan.generation_config.sampling_params(eos_token_ids, vocabulary_tokens),
        device_map=placement.device_map(model),
        prequantized=plan.prequantized_dir is not None,
    )


def _pooling_model(plan: LoadPlan, pooling: Pooling, model: Any, tokenizer: Any, context_tokens: int) -> LoadedModel:
    """Return a model whose forward passes are transformers' own."""
    model.config.use_cache = False
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:
        # Classifiers on decoders find the last token of each row by it.
        text_config.pad_token_id = getattr(tokenizer, "pad_token_id", None) or 0
    if pooling.task is Task.EMBED and getattr(model, "pooler", None) is not None:
        model.pooler = None
    vocabulary_tokens = int(model.get_input_embeddings().weight.shape[0])
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        context_tokens=context_length.of_texts(model, tokenizer, context_tokens, pooling.max_tokens),
        vocabulary_tokens=vocabulary_tokens,
        unembedded_tokens=_unembedded_tokens(tokenizer, vocabulary_tokens),
        eos_token_ids=frozenset(),
        quantization=_resolved_method(model, plan.quantization),
        int8_kernels="",
        defaults=SamplingParams(),
        device_map=placement.device_map(model),
        prequantized=False,
        pooling=pooling,
    )


def _load_tokenizer(plan: LoadPlan) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            plan.weights_dir, local_files_only=True, trust_remote_code=plan.trust_remote_code
        )
    except Exception as error:
        raise _load_error("tokenizer", plan.weights_dir, error) from error


def _load_weights(plan: LoadPlan) -> Any:
    task = Task.GENERATE if plan.pooling is None else plan.pooling.task
    model_class = getattr(transformers, architectures.AUTO_CLASSES[task])
    # Read by `GenerationConfig` of this package.
    options = {"generation_config": transformers.GenerationConfig()} if task is Task.GENERATE else {}
    source: Path | None = plan.weights_dir
    merged: dict[str, Any] | None = None
    if plan.adapter is not None:
        # Auto classes need a directory, and `state_dict` excludes one.
        model_class, source = MODEL_FOR_CAUSAL_LM_MAPPING[type(plan.config)], None
        entry = getattr(plan.config, "transformers_weights", None)
        merged = plan.adapter.merge(checkpoint.find_weights(plan.weights_dir, entry).files)
    try:
        model, loading_info = model_class.from_pretrained(
            source,
            config=plan.config,
            state_dict=merged,
            **options,
            dtype=plan.dtype,
            **plan.placement.arguments(),
            quantization_config=plan.quantization_config,
            local_files_only=True,
            trust_remote_code=plan.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except UnsupportedModel:
        raise
    except Exception as error:
        tensor_parallel.check_exchanges()
        if memory.is_out_of_memory(error):
            raise UnsupportedModel(
                f"Not enough memory to load the weights in {plan.weights_dir} ({checkpoint.first_line(error)}). "
                "Add memory or set --quantization."
            ) from error
        raise _load_error("weights", plan.weights_dir, error) from error
    if task is Task.EMBED:
        # Embeddings are made of the last hidden states; masked language models are saved without BERT's pooler.
        missing = (name for name in loading_info["missing_keys"] if not name.startswith("pooler."))
        loading_info = {**loading_info, "missing_keys": list(missing)}
    checkpoint.check_complete(plan.weights_dir, loading_info)
    int4_checkpoint.unpack_layers(model, plan.weights_dir)
    return model


@contextmanager
def _progress_bars_report(report: ReportWeights | None) -> Iterator[None]:
    """Report the position of transformers' progress bar of the weights, as far as this thread loads them."""
    thread = threading.get_ident()

    def create(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if report and options.get("desc") == WEIGHTS_BAR and threading.get_ident() == thread:
            args = (_counted(args[0], report), *args[1:])
        return factory(*args, **options)

    previous = transformers.utils.logging.set_tqdm_hook(create)
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(previous)


def _counted(tensors: Collection[T], report: ReportWeights) -> Iterator[T]:
    for index, tensor in enumerate(tensors):
        report(index / len(tensors))
        yield tensor
    report(1.0)


def _load_error(part: str, directory: Path, error: Exception) -> UnsupportedModel:
    """Wrap an error of transformers, which has no common class for unusable files."""
    fix = "Add that package to the image" if isinstance(error, ImportError) else "Download the model again"
    return UnsupportedModel(f"The {part} in {directory} cannot be loaded ({checkpoint.first_line(error)}). {fix}.")


def _pack(model: Any, quantization: str, skip_modules: Sequence[str]) -> None:
    lm_head = model.get_output_embeddings()
    quantizes_lm_head = (
        quantization in _INT8_LM_HEAD and type(lm_head) is nn.Linear and should_quantize(model, lm_head, skip_modules)
    )
    quantized_experts = [
        module
        for name, module in model.named_modules()
        if quantization in ("8bit", "4bit") and are_experts(module) and not is_skipped(name, skip_modules)
    ]
    decoder_layer.fuse(model)
    linear.pack_linear_layers(model, lm_head, quantize_lm_head=quantizes_lm_head)
    experts.pack(model, quantized_experts)


def _resolved_method(model: Any, mode: str) -> str:
    checkpoint_config = getattr(model.config, "quantization_config", None) if mode == "none" else None
    method = mode if checkpoint_config is None else str(getattr(checkpoint_config, "quant_method", "unknown"))
    return {INT8_METHOD: "8bit", INT4_METHOD: "4bit"}.get(method) or int4_checkpoint_quantizer.checkpoint_method(method)


def _unembedded_tokens(tokenizer: Any, vocabulary_tokens: int) -> dict[int, str]:
    """Return the tokens without an embedding, by id, and log them."""
    unembedded = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= vocabulary_tokens}
    if unembedded:
        logger.warning(
            "the model's embedding has %d rows, too few for %d of the tokenizer's tokens: %s; prompts with them are "
            "refused; use the tokenizer that the model was trained with, or resize the embedding",
            vocabulary_tokens,
            len(unembedded),
            ", ".join(f"{token!r} ({token_id})" for token_id, token in sorted(unembedded.items())[:_NAMED_TOKENS]),
        )
    return unembedded
