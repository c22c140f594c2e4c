"""Linear layers that transformers divided among tensor-parallel ranks.

Their parameters are `DTensor`s, of which a rank has a part, and their forward functions exchange what that takes. Our
kernels replace such layers, so they exchange it themselves, as the model's plan says.
"""

import re
from collections.abc import Mapping, MutableMapping, Sequence
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from predictor.kernels import tensor_parallel


class Division(Enum):
    """How the weight of a linear layer is divided, and whether the layer's ends are."""

    NONE = "every rank has the whole layer"
    OUTPUTS = "each rank has some outputs"
    GATHERED_OUTPUTS = "each rank computes some outputs, and gets all"
    INPUTS = "each rank has some inputs; the outputs are summed"
    SPLIT_INPUTS = "each rank gets all inputs, and uses some; the outputs are summed"
    OTHER = "in a way that only transformers' layer knows"


_DIVISIONS = {
    "colwise": Division.OUTPUTS,
    "colwise_gather_output": Division.GATHERED_OUTPUTS,
    "colwise_rep": Division.GATHERED_OUTPUTS,
    "replicate": Division.NONE,
    "replicated_with_grad_allreduce": Division.NONE,
    "rowwise": Division.INPUTS,
    "rowwise_rep": Division.SPLIT_INPUTS,
    "rowwise_split_input": Division.SPLIT_INPUTS,
}
"""By the styles of transformers' plans."""


Divisions = MutableMapping[nn.Module, Division]
"""Of modules, by module. Modules that were replaced are not kept."""


def divisions(model: Any) -> Divisions:
    """Return how the layers of a model are divided; without entries if there is one rank."""
    plan: Mapping[str, str] = {} if tensor_parallel.size() == 1 else model.tp_plan
    found: Divisions = WeakKeyDictionary()
    if plan:
        for name, module in model.named_modules():
            found[module] = _DIVISIONS.get(plan.get(pattern(name), "replicate"), Division.OTHER)
    return found


def common(found: Divisions, layers: Sequence[nn.Module]) -> Division:
    """Return how all of the layers are divided; `OTHER` if they differ."""
    kinds = {found.get(layer, Division.NONE) for layer in layers}
    return kinds.pop() if len(kinds) == 1 else Division.OTHER


def pattern(name: str) -> str:
    """Return a module's name as in plans, which have * for the numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def replicate_scales(model: nn.Module, plan: MutableMapping[str, str]) -> None:
    """Give every rank the scales of all outputs of layers of which it has some columns; their parameters are `scale`.

    Args:
        model: whose layers were replaced by quantized ones.
        plan: of the model, to be changed.
    """
    divided = (Division.INPUTS, Division.SPLIT_INPUTS)
    scales = {f"{name}.scale" for name, style in plan.items() if _DIVISIONS.get(style) in divided}
    parameters = {pattern(name) for name, _ in model.named_parameters()}
    plan.update(dict.fromkeys(scales & parameters, "replicate"))


def has_part_of_rows(weight: torch.Tensor) -> bool:
    """Whether this rank has some columns of a weight (out_features, in_features)."""
    return isinstance(weight, DTensor) and any(
        placement.is_shard(1) or placement.is_shard(-1) for placement in weight.placements
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a parameter; all of it if it is not divided."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def divides_heads(config: Any) -> bool:
    """Whether ranks have some attention heads each, by a model's config, in projections that the KV cache knows."""
    return _attention_styles(config, "k_proj", "v_proj") == {"colwise"}


def gathers_heads(config: Any) -> bool:
    """Whether ranks divide a fused projection, and have all attention heads."""
    return _attention_styles(config, "qkv_proj") == {"colwise_gather_output"}


def _attention_styles(config: Any, *projections: str) -> set[str | None]:
    plan = getattr(config, "base_model_tp_plan", None) or {}
    return {plan.get(f"layers.*.self_attn.{name}") for name in projections}
