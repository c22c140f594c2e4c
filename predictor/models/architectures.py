"""Fence around transformers' model classes: what a model does, and whether it can be served, by config.json alone.

The engine keeps keys and values of every token in pages, and packs all sequences of a step into one row. That fits
decoders with full or sliding causal attention whose code uses transformers' attention interface.
`docs/architectures.md` lists those that were compared with transformers' `generate`. Models that embed or classify
are run by plain forward passes.
"""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from predictor.errors import UnsupportedModel
from predictor.kernels import past_key_values
from predictor.types import Task

_VLLM = "KServe's huggingfaceserver, which runs vLLM"
_HUGGINGFACE_BACKEND = "KServe's huggingfaceserver with --backend=huggingface"
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
MODULES = "modules.json"
"""List of the modules of a Sentence Transformer."""
AUTO_CLASSES = {
    Task.GENERATE: "AutoModelForCausalLM",
    Task.EMBED: "AutoModel",
    Task.CLASSIFY: "AutoModelForSequenceClassification",
}
"""transformers' class that loads a model for the task."""
_MAPPINGS = {Task.EMBED: MODEL_MAPPING, Task.CLASSIFY: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING}


class Refusal(NamedTuple):
    """Why the engine cannot run an architecture, and what can."""

    reason: str
    remedy: str


def choose_task(config: Any, directory: Path) -> Task:
    """Return what a model does: classify by its architecture, embed as Sentence Transformer or encoder, or generate."""
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return Task.CLASSIFY
    if (directory / MODULES).is_file() or _is_text_encoder(config):
        return Task.EMBED
    return Task.GENERATE


def is_causal(config: Any) -> bool:
    """Whether the attention of a model sees earlier tokens only."""
    return not (_is_text_encoder(config) or getattr(config.get_text_config(), "use_bidirectional_attention", False))


def check(config: Any, directory: Path, task: Task, *, has_remote_code: bool) -> None:
    """Check that a model can be served for the task.

    Args:
        config: of transformers.
        directory: of the model, for the message.
        task: of the server.
        has_remote_code: the model's class comes with the weights; it is not imported here.

    Raises:
        UnsupportedModel: it cannot; the message names the architecture, the reason and what serves it.
    """
    architecture = ", ".join(config.architectures or ()) or config.model_type
    if task is not Task.GENERATE:
        if config.is_encoder_decoder:
            raise UnsupportedModel(
                f"{directory} holds a {architecture}, an encoder-decoder model, which is not served."
            )
        if not has_remote_code and type(config) not in _MAPPINGS[task]:
            raise UnsupportedModel(f"{directory} holds a {architecture}, which cannot {task} texts. Set --task auto.")
        return
    refused = refusal(config, has_remote_code=has_remote_code)
    if refused is not None:
        raise UnsupportedModel(
            f"{directory} holds a {architecture}, which this server does not support: {refused.reason}. "
            f"Serve it with {refused.remedy}, or choose a model of docs/architectures.md."
        )
    if not has_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"{directory} holds a {architecture}, which does not generate text. Serve a causal language model."
        )


def refusal(config: Any, *, has_remote_code: bool = False) -> Refusal | None:
    """Return why the engine cannot run a language model; None if it can."""
    if config.is_encoder_decoder:
        return Refusal("it is an encoder-decoder model", _HUGGINGFACE_BACKEND)
    if _is_encoder(config):
        return Refusal("its attention is bidirectional (`is_decoder` is false)", _HUGGINGFACE_BACKEND)
    text_config = config.get_text_config()
    unknown = sorted(set(getattr(text_config, "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        return Refusal(f"it has layers of type {', '.join(unknown)}", _VLLM)
    if text_config.to_dict().get("kv_lora_rank"):
        return Refusal("its KV cache is compressed (multi-head latent attention)", _VLLM)
    if getattr(text_config, "alibi", False):
        return Refusal("its positions are biases of the attention scores (ALiBi)", _VLLM)
    if not has_remote_code and not _passes_cache(config):
        return Refusal("its code does not use transformers' attention interface", f"{_VLLM} (or --backend=huggingface)")
    return None


def _is_encoder(config: Any) -> bool:
    """Whether a config that has the choice makes its model an encoder, as BERT's do."""
    # Encoders such as BERT are registered as decoders, too. GPT-NeoX has the field, and is always a decoder.
    return not getattr(config, "is_decoder", True) and not config.model_type.startswith("gpt_")


def _is_text_encoder(config: Any) -> bool:
    """Whether a model of texts, by its vocabulary, has no decoder."""
    if config.is_encoder_decoder or not hasattr(type(config), "vocab_size"):
        return False
    return type(config) in MODEL_MAPPING and (_is_encoder(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING)


def _passes_cache(config: Any) -> bool:
    """Whether the attention of the model's layers gets the paged KV cache. True without a causal language model."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return (
        model_class is None
        or config.model_type in past_key_values.MODEL_TYPES
        or bool(model_class._supports_attention_backend)
    )
