"""Fence around transformers' model classes: which architectures the engine can run, by config.json alone.

The engine keeps keys and values of every token in pages, and packs all sequences of a step into one row. That fits
decoders with full or sliding causal attention whose code uses transformers' attention interface.
`docs/architectures.md` lists those that were compared with transformers' `generate`.
"""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from predictor.errors import UnsupportedModel
from predictor.kernels import past_key_values

_VLLM = "KServe's huggingfaceserver, which runs vLLM"
_HUGGINGFACE_BACKEND = "KServe's huggingfaceserver with --backend=huggingface"
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


class Refusal(NamedTuple):
    """Why the engine cannot run an architecture, and what can."""

    reason: str
    remedy: str


def check(config: Any, directory: Path, *, has_remote_code: bool) -> None:
    """Check that the engine can run the architecture.

    Args:
        config: of transformers.
        directory: of the model, for the message.
        has_remote_code: the model's class comes with the weights; it is not imported here.

    Raises:
        UnsupportedModel: it cannot; the message names the architecture, the reason and what serves it.
    """
    architecture = ", ".join(config.architectures or ()) or config.model_type
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
    # Encoders such as BERT are registered as decoders, too. GPT-NeoX has the field, and is always a decoder.
    if not getattr(config, "is_decoder", True) and not config.model_type.startswith("gpt_"):
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


def _passes_cache(config: Any) -> bool:
    """Whether the attention of the model's layers gets the paged KV cache. True without a causal language model."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return (
        model_class is None
        or config.model_type in past_key_values.MODEL_TYPES
        or bool(model_class._supports_attention_backend)
    )
