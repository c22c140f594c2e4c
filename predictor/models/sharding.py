"""Whether a model can be divided among tensor-parallel ranks, by config.json alone.

transformers has plans that say how layers are divided. The engine's KV cache has the heads of one rank only if the
plan divides projections of the names that the batching manager knows; otherwise it has all heads.
"""

from pathlib import Path
from typing import Any

from predictor.errors import InvalidSettings, UnsupportedModel
from predictor.kernels import shards, tensor_parallel
from predictor.types import Task

_MASKS_OF_ALL_HEADS = ("doge",)
"""Models whose plan divides attention heads, but not a mask of each head."""
_EXPERT_ALIGNMENT = 8
"""Features: torch multiplies by several experts at once if their rows are 16 bytes, or a multiple, apart."""
_SINGLE = "Set --tensor_parallel_size 1."


def check(config: Any, directory: Path, task: Task, *, has_remote_code: bool) -> None:
    """Check that the ranks of this process's group can share a model; one rank always can.

    Args:
        config: of transformers.
        directory: of the model, for the message.
        task: of the server.
        has_remote_code: the model's class comes with the weights; it is not imported here.

    Raises:
        InvalidSettings: the task excludes tensor parallelism.
        UnsupportedModel: the architecture or its number of heads does; the message names the largest number of ranks.
    """
    ranks = tensor_parallel.size()
    if ranks == 1:
        return
    if task is not Task.GENERATE:
        raise InvalidSettings(
            f"--tensor_parallel_size is {ranks}, but a model that embeds or classifies is served by one rank. {_SINGLE}"
        )
    architecture = ", ".join(config.architectures or ()) or config.model_type
    refused = "a model with its own code is not divided" if has_remote_code else refusal(config)
    if refused:
        raise UnsupportedModel(
            f"{directory} holds a {architecture}, which {ranks} ranks cannot share: {refused}. {_SINGLE}"
        )
    if unequal := _unequal(config, ranks):
        largest = max(size for size in range(1, ranks) if not _unequal(config, size))
        raise UnsupportedModel(
            f"{directory} holds a {architecture} with {unequal}, which {ranks} ranks cannot share equally. "
            f"Set --tensor_parallel_size {largest}."
        )


def _unequal(config: Any, ranks: int) -> str:
    """Return what of a model ranks cannot share equally; empty if they can share everything. One rank always can."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if shards.divides_heads(config) and (heads % ranks or kv_heads % ranks):
        return f"{heads} attention heads and {kv_heads} KV heads"
    width = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    has_experts = "moe_tp_experts" in config.base_model_tp_plan.values()
    if ranks > 1 and has_experts and (width or 0) % (ranks * _EXPERT_ALIGNMENT):
        return f"experts of {width} features (a rank's part is a multiple of {_EXPERT_ALIGNMENT})"
    return ""


def refusal(config: Any) -> str:
    """Return why the layers of an architecture cannot be divided; empty if they can."""
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        return "transformers has no plan to divide its layers"
    if config.model_type in _MASKS_OF_ALL_HEADS:
        return "its attention masks have all heads on every rank"
    if shards.divides_heads(config) or shards.gathers_heads(config):
        return ""
    return "its plan in transformers does not divide attention as the KV cache needs it"
