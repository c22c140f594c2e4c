"""How many tokens a model's positions allow, from its config.

Frequencies of dynamic NTK and longrope depend on the length of the sequence. A step packs many sequences into one row,
where only the longest would count. So the frequencies are those of one length: without `--max_model_len` the length up
to which they stay the same, with it those of the whole context, for every sequence.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from predictor.errors import InvalidSettings, UnsupportedModel

logger = logging.getLogger(__name__)

LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})
_UNLIMITED = 10**9
"""transformers' `model_max_length` of a tokenizer without a limit is above this."""


@dataclass(frozen=True, slots=True)
class ContextLength:
    """Tokens of prompt and completion together."""

    default: int
    """Up to here rope's frequencies are the same for all lengths."""
    maximum: int
    """Up to here the position encoding is defined."""


def context_length(config: Any) -> ContextLength | None:
    """Return the context length of a transformers config; None if it has no number of positions."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None:
        return None
    lengths = [_with_rope(positions, parameters) for parameters in rope_parameters(text_config)]
    return ContextLength(
        min((length.default for length in lengths), default=positions),
        min((length.maximum for length in lengths), default=positions),
    )


def resolve(config: Any, directory: Path, max_model_len: int | None) -> int | None:
    """Return the context in tokens; None if neither the config nor the setting has it.

    Raises:
        InvalidSettings: `max_model_len` is more than the positions allow.
        UnsupportedModel: `max_model_len` needs other frequencies, for which the config has a set per layer type.
    """
    length = context_length(config)
    if length is None:
        return max_model_len
    parameters = rope_parameters(config.get_text_config())
    depends = [each["rope_type"] for each in parameters if each["rope_type"] in LENGTH_DEPENDENT]
    if max_model_len is None:
        if depends and length.default < length.maximum:
            logger.warning(
                "the context is %d tokens: beyond it, the rope of type %s depends on the length of the sequence; "
                "--max_model_len up to %d uses the frequencies of that length for every sequence",
                length.default,
                depends[0],
                length.maximum,
            )
        return length.default
    if max_model_len > length.maximum:
        extend = ", or scale the rope in config.json as the model's authors describe" if parameters else ""
        raise InvalidSettings(
            f"--max_model_len is {max_model_len}, but the model in {directory} has positions for {length.maximum} "
            f"tokens. Set at most {length.maximum}{extend}."
        )
    if depends and len(parameters) > 1 and max_model_len > length.default:
        raise UnsupportedModel(
            f"The rope of the model in {directory} depends on the length, by layer type. "
            f"Set --max_model_len to at most {length.default}."
        )
    return max_model_len


def needs_fixed_rope(config: Any, context_tokens: int) -> bool:
    """Whether rope's frequencies depend on the length of a sequence within the context."""
    length = context_length(config)
    depends = any(each["rope_type"] in LENGTH_DEPENDENT for each in rope_parameters(config.get_text_config()))
    return depends and length is not None and context_tokens > length.default


def from_tokenizer(tokenizer: Any, directory: Path) -> int:
    """Return the context in tokens of a model whose config has none.

    Raises:
        UnsupportedModel: the tokenizer has no limit either.
    """
    if tokenizer.model_max_length > _UNLIMITED:
        raise UnsupportedModel(
            f"Neither config.json (max_position_embeddings) nor tokenizer_config.json (model_max_length) in "
            f"{directory} has the length of the context. Set --max_model_len."
        )
    return int(tokenizer.model_max_length)


def of_texts(model: Any, tokenizer: Any, context_tokens: int, max_tokens: int | None) -> int:
    """Return the maximum of tokens of a text to embed or classify.

    Args:
        model: of transformers.
        tokenizer: the model's.
        context_tokens: by the config, or set by the user.
        max_tokens: of the snapshot's own configuration; None: no limit.
    """
    limits = [context_tokens, int(tokenizer.model_max_length), *([max_tokens] if max_tokens else [])]
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        # Positions of RoBERTa and its like begin after that of padding tokens.
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(int(module.weight.shape[0]) - padding - 1)
    return min(limits)


def rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    """Return the parameters of rope, one set or one per layer type; empty without rope."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [each for each in parameters.values() if isinstance(each, dict) and "rope_type" in each]


def _with_rope(positions: int, parameters: dict[str, Any]) -> ContextLength:
    # `max_position_embeddings` is the length before or after scaling, depending on the model.
    original = parameters.get("original_max_position_embeddings") or positions
    scaled = max(positions, int(original * (parameters.get("factor") or 1)))
    match parameters["rope_type"]:
        case "yarn":
            return ContextLength(scaled, scaled)
        case "longrope":
            return ContextLength(min(original, positions), scaled)
        case "linear" | "dynamic":
            return ContextLength(positions, scaled)
    return ContextLength(positions, positions)
