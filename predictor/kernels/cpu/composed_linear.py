"""Linear kernels that compose another one with a permutation or with communication between ranks."""

import torch

from predictor.kernels import tensor_parallel
from predictor.kernels.cpu.gemm import Float32InputLinear, LinearKernel, RMSNorm


class ReorderedInputLinear(Float32InputLinear):
    """Layer whose weight has its columns in another order than the inputs.

    Args:
        kernel: of the weight.
        order: (in_features,): the input of each column.
    """

    def __init__(self, kernel: LinearKernel, order: torch.Tensor) -> None:
        super().__init__()
        self._kernel, self._order = kernel, order
        self._gate_up_order = torch.cat((order, order + len(order)))

    def forward(
        self, hidden_states: torch.Tensor, norm: RMSNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply norm, layer and residual to the inputs in the order of the columns."""
        if norm is not None:
            norm = RMSNorm(norm.weight[self._order], norm.epsilon)
        return self._kernel.forward(hidden_states[:, self._order], norm, residual)

    def silu_and_mul(self, gate_up: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Apply activation, layer and residual; `gate_up` stays as it is."""
        return self._kernel.silu_and_mul(gate_up[:, self._gate_up_order], residual)


class GatheredLinear(Float32InputLinear):
    """Layer of which each tensor-parallel rank computes some outputs and gets all.

    Args:
        kernel: of this rank's outputs.
        out_features: of all ranks.
    """

    def __init__(self, kernel: LinearKernel, out_features: int) -> None:
        super().__init__()
        self._kernel, self._out_features = kernel, out_features

    def forward(
        self, hidden_states: torch.Tensor, norm: RMSNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply norm and layer, gather the outputs, and add the residual."""
        outputs = tensor_parallel.all_gather(self._kernel.forward(hidden_states, norm), self._out_features)
        return outputs if residual is None else outputs.add_(residual)


class RowParallelLinear(Float32InputLinear):
    """Layer of which each tensor-parallel rank has some columns: its outputs are the sum of all ranks'.

    Args:
        kernel: of this rank's columns, without a bias.
        bias: added once, after the sum.
        splits_input: whether inputs have all features; else those of this rank's columns.
    """

    def __init__(self, kernel: LinearKernel, bias: torch.Tensor | None, *, splits_input: bool = False) -> None:
        super().__init__()
        self._kernel, self._splits_input = kernel, splits_input
        self._bias = None if bias is None else bias.float()

    def forward(
        self, hidden_states: torch.Tensor, norm: RMSNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply the layer; sum, residual and bias in float32. A norm over a part of the features is an error."""
        if norm is not None:
            raise ValueError("an RMSNorm needs all features, and a rank has some of them")
        if self._splits_input:
            hidden_states = hidden_states.chunk(tensor_parallel.size(), -1)[tensor_parallel.rank()]
        return self._sum(self._kernel.forward(hidden_states), residual)

    def silu_and_mul(self, gate_up: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Apply activation, layer, sum, residual and bias; `gate_up` is overwritten."""
        if self._splits_input:
            return super().silu_and_mul(gate_up, residual)
        return self._sum(self._kernel.silu_and_mul(gate_up), residual)

    def _sum(self, partial: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        outputs = tensor_parallel.all_reduce(partial)
        if residual is not None:
            outputs = outputs.add_(residual)
        return outputs if self._bias is None else outputs.add_(self._bias)
