"""Experts of mixture-of-experts layers, packed for CPU kernels.

transformers keeps the matrices of all experts in one parameter and multiplies by several experts at once, in bfloat16.
Here each expert is a pair of linear kernels, which compute the tokens that are routed to it. A token's result does not
depend on the batch if the kernels' do not: outputs are summed in the order of the token's choices, and routers compute
blocks of one size.
"""

from collections.abc import Collection

import torch
from torch import nn

from predictor.kernels import tensor_parallel
from predictor.kernels.cpu import gemm
from predictor.kernels.cpu.gemm import LinearKernel
from predictor.kernels.cpu.layer_table import ExpertsParts, are_experts, is_router

MATRICES = ("gate_up_proj", "down_proj")
ROUTER_BLOCK_TOKENS = 8
"""How torch's matrix products round a row depends on the number of rows."""


def prepare_for_int8(experts: nn.Module) -> None:
    """Replace the matrices of experts by empty ones in int8, and add parameters for their scales."""
    is_transposed = ExpertsParts.of(experts).is_transposed
    for name in MATRICES:
        weights = experts.get_parameter(name)
        num_experts, out_features, _ = weights.mT.shape if is_transposed else weights.shape
        qweights = torch.empty_like(weights, dtype=torch.int8)
        scales = torch.empty(num_experts, out_features, dtype=torch.float32, device=weights.device)
        experts.register_parameter(name, nn.Parameter(qweights, requires_grad=False))
        experts.register_parameter(_scale_name(name), nn.Parameter(scales, requires_grad=False))


def is_int8_matrix(module: nn.Module, name: str) -> bool:
    """Whether a parameter is one that `prepare_for_int8` made, and that `quantize` fills."""
    return name in MATRICES and hasattr(module, _scale_name(name))


def quantize(experts: nn.Module, name: str, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize a matrix of all experts, with a float32 scale per expert and output.

    Args:
        experts: which the matrix is of.
        name: of the matrix.
        weights: (experts, out_features, in_features), or transposed if the experts' are.

    Returns:
        int8 weights of the same shape, and scales (experts, out_features), by the names of their parameters.
    """
    is_transposed = ExpertsParts.of(experts).is_transposed
    qweights, scales = torch.empty_like(weights, dtype=torch.int8), []
    for weight, qweight in zip(weights, qweights.mT if is_transposed else qweights, strict=True):
        quantized, scale = gemm.quantize_per_channel_int8(weight.T if is_transposed else weight)
        qweight.copy_(quantized)
        scales.append(scale)
    return {name: qweights, _scale_name(name): torch.stack(scales)}


def pack(model: nn.Module, quantized: Collection[nn.Module] = ()) -> None:
    """Replace experts by `PackedExperts` in place, and free their weights.

    Args:
        model: on a CPU, with experts in bfloat16, or in int8 by `prepare_for_int8`; others are unchanged, as are those
            that tensor-parallel ranks share.
        quantized: its experts to be quantized to int8, unless they are already.
    """
    if tensor_parallel.size() > 1:
        return
    found = [
        (parent, name, experts in quantized)
        for parent in model.modules()
        for name, experts in parent.named_children()
        if are_experts(experts)
    ]
    gemm.map_in_threads(_pack_layer, found)


def _pack_layer(parent: nn.Module, name: str, quantizes: bool) -> None:
    experts = parent.get_submodule(name)
    if quantizes and not is_int8_matrix(experts, MATRICES[0]):
        for matrix in MATRICES:
            for parameter, values in quantize(experts, matrix, experts.get_parameter(matrix).detach()).items():
                experts.register_parameter(parameter, nn.Parameter(values, requires_grad=False))
    parts = ExpertsParts.of(experts)
    gate_up, down = (_pack_matrix(experts, matrix, parts) for matrix in MATRICES)
    if not gate_up or not down:
        return
    for parameter in dict(experts.named_parameters()):
        experts.register_parameter(parameter, None)
    parent.register_module(name, PackedExperts(parts, gate_up, down))
    for sibling, module in parent.named_children():
        if is_router(module):
            parent.register_module(sibling, BlockedRouter(module))


def _pack_matrix(experts: nn.Module, name: str, parts: ExpertsParts) -> list[LinearKernel]:
    """Pack the matrix of each expert; empty if no kernel supports them."""
    weights = experts.get_parameter(name).detach()
    biases = experts.get_parameter(f"{name}_bias").detach() if parts.has_bias else [None] * len(weights)
    if parts.is_transposed:
        weights = weights.mT
    if is_int8_matrix(experts, name):
        scales = experts.get_parameter(_scale_name(name)).detach()
        return [gemm.make_int8_linear(*matrix) for matrix in zip(weights, scales, biases, strict=True)]
    if weights.dtype != torch.bfloat16:
        return []
    kernels = [gemm.make_bf16_linear(*matrix) for matrix in zip(weights, biases, strict=True)]
    return [kernel for kernel in kernels if kernel is not None]


def _scale_name(matrix: str) -> str:
    return f"{matrix}_scale"


class PackedExperts(nn.Module):
    """Drop-in replacement for the experts of a layer.

    Args:
        parts: of the experts.
        gate_up: fused gate and up projection of each expert.
        down: down projection of each expert.
    """

    def __init__(self, parts: ExpertsParts, gate_up: list[LinearKernel], down: list[LinearKernel]) -> None:
        super().__init__()
        self._parts, self._gate_up, self._down = parts, gate_up, down

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute each token by its experts, and sum the weighted outputs.

        Args:
            hidden_states: (tokens, features).
            indices: experts of each token, (tokens, choices).
            weights: of their outputs, (tokens, choices).

        Returns:
            (tokens, features), in the dtype of `hidden_states`.
        """
        tokens, choices = indices.shape
        order = indices.flatten().argsort(stable=True)
        counts = indices.flatten().bincount(minlength=len(self._down)).tolist()
        inputs = hidden_states.float()[order.div(choices, rounding_mode="floor")]
        outputs = torch.cat(
            [self._compute(expert, rows) for expert, rows in enumerate(inputs.split(counts)) if len(rows)]
        )
        by_token = torch.empty_like(outputs).index_copy_(0, order, outputs).view(tokens, choices, -1)
        result = by_token[:, 0] * weights[:, :1].float()
        for choice in range(1, choices):
            result.addcmul_(by_token[:, choice], weights[:, choice : choice + 1].float())
        return result.to(hidden_states.dtype)

    def _compute(self, expert: int, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up = self._gate_up[expert].forward(hidden_states)
        if self._parts.is_silu:
            return self._down[expert].silu_and_mul(gate_up)
        return self._down[expert].forward(self._parts.apply_gate(gate_up))


class BlockedRouter(nn.Module):
    """A router that computes a fixed number of tokens at a time, so that its choices do not depend on the batch."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self._router = router

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the router returns for (tokens, features)."""
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens = len(hidden_states)
        padded = nn.functional.pad(hidden_states, (0, 0, 0, -tokens % ROUTER_BLOCK_TOKENS))
        blocks = [self._router(block) for block in padded.split(ROUTER_BLOCK_TOKENS)]
        return tuple(torch.cat(parts)[:tokens] for parts in zip(*blocks, strict=True))
