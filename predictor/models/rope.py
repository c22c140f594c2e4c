"""Fence around transformers' rotary embeddings: frequencies of one length for every sequence.

`tests/contracts/test_upstream.py` tests what this module relies on.
"""

from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from predictor.errors import UnsupportedModel
from predictor.models.context_length import LENGTH_DEPENDENT


def fix_length(model: Any, context_tokens: int) -> None:
    """Replace frequencies that depend on the length of the sequence by those of `context_tokens`.

    Raises:
        UnsupportedModel: the model computes them in code of its own.
    """
    embeddings = [module for module in model.modules() if getattr(module, "rope_type", None) in LENGTH_DEPENDENT]
    if not embeddings:
        raise UnsupportedModel(
            "The model's rope depends on the length, in code of its own. "
            "Lower --max_model_len to the length that it was trained with."
        )
    for embedding in embeddings:
        compute = ROPE_INIT_FUNCTIONS[embedding.rope_type]
        frequencies, scaling = compute(embedding.config, embedding.inv_freq.device, seq_len=context_tokens)
        embedding.inv_freq.copy_(frequencies)
        embedding.attention_scaling = scaling
        embedding.rope_type = "default"  # transformers updates the frequencies of other types at every step
