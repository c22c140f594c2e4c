"""OpenAI's list of models."""

from collections.abc import Mapping, Sequence
from typing import Any

OWNER = "kserve-llm"


def model_list(
    names: Sequence[str], *, created: int, context_tokens: int | None, lineage: Mapping[str, str]
) -> dict[str, Any]:
    """Return the list of models; see `model_card` for the arguments."""
    cards = [model_card(name, created=created, context_tokens=context_tokens, lineage=lineage) for name in names]
    return {"object": "list", "data": cards}


def model_card(name: str, *, created: int, context_tokens: int | None, lineage: Mapping[str, str]) -> dict[str, Any]:
    """Return the description of one model.

    Args:
        name: as in requests.
        created: Unix time in seconds.
        context_tokens: maximum of prompt and completion together, vLLM's `max_model_len`; None while unknown.
        lineage: vLLM's `root` and `parent` of a model with an adapter: the references of both.
    """
    card = {"id": name, "object": "model", "created": created, "owned_by": OWNER, **lineage}
    return card if context_tokens is None else {**card, "max_model_len": context_tokens}
