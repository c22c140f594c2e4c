"""One forward pass over texts: an embedding or the scores of each, without a KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from predictor.types import Pooling, Task

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PoolingInput:
    """The tokens of one text, or of one pair."""

    token_ids: Sequence[int]
    token_type_ids: Sequence[int] | None = None
    """Which text of a pair each token belongs to, for models that have such types."""


class PoolingModel:
    """A transformers model and what follows its last layer.

    Args:
        model: an encoder, decoder or classifier, in evaluation mode, on its device.
        pooling: of its snapshot.
    """

    def __init__(self, model: Any, pooling: Pooling) -> None:
        self._model = model
        self._pooling = pooling
        self._pad_token_id = int(model.config.get_text_config().pad_token_id)

    def __call__(self, inputs: Sequence[PoolingInput]) -> "NDArray[numpy.float32]":
        """Return one row for each input, (inputs, dimensions or labels).

        Rows are padded on the right, where neither causal attention nor the positions of earlier tokens change.
        """
        length = max(len(each.token_ids) for each in inputs)
        lengths = torch.tensor([len(each.token_ids) for each in inputs])
        mask = torch.arange(length) < lengths[:, None]
        arguments = {
            "input_ids": _padded([each.token_ids for each in inputs], length, self._pad_token_id),
            "attention_mask": mask.long(),
        }
        types = [each.token_type_ids for each in inputs]
        if any(each is not None for each in types):
            rows = [each or [0] * len(input_.token_ids) for each, input_ in zip(types, inputs, strict=True)]
            arguments["token_type_ids"] = _padded(rows, length, 0)
        device = self._model.device
        with torch.inference_mode():
            output = self._model(**{name: tensor.to(device) for name, tensor in arguments.items()})
            vectors = self._vectors(output, mask.to(device))
        rows_out: NDArray[numpy.float32] = vectors.cpu().numpy()
        return rows_out

    def _vectors(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        pooling = self._pooling
        if pooling.task is Task.CLASSIFY:
            return _ACTIVATIONS[pooling.activation](output.logits.float())
        hidden = output.last_hidden_state.float()
        vectors = torch.cat([_MODES[mode](hidden, mask) for mode in pooling.modes], dim=1)
        return torch.nn.functional.normalize(vectors) if pooling.normalize else vectors


def _padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> torch.Tensor:
    return torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "none": lambda logits: logits,
}


def _sum(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (hidden * weights[..., None]).sum(1)


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _sum(hidden, mask) / mask.sum(1, keepdim=True)


def _mean_sqrt_len(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _sum(hidden, mask) / mask.sum(1, keepdim=True).sqrt()


def _weighted_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weight each token by its position, 1 for the first."""
    weights = mask.cumsum(1) * mask
    return _sum(hidden, weights) / weights.sum(1, keepdim=True)


def _last_token(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


_MODES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": lambda hidden, _: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(~mask[..., None], -torch.inf).amax(1),
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}
"""By name in `pooling.MODES`: (inputs, tokens, hidden size) and the mask of tokens -> (inputs, hidden size)."""
