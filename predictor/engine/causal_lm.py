"""The part of a transformers causal language model that the engine uses."""

import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)


class TextConfig(Protocol):
    """Sizes of a decoder; `head_dim`, `num_key_value_heads` and `intermediate_size` are optional."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    vocab_size: int


class ModelConfig(Protocol):
    """A transformers config."""

    def get_text_config(self) -> TextConfig:
        """Return the decoder's part, which is the whole for a text model."""


class CausalLM(Protocol):
    """A model in evaluation mode, on its device."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield all parameters; they may be on several devices."""

    def get_input_embeddings(self) -> Any:
        """Return the module whose `weight` is (token ids, hidden_size)."""

    def get_output_embeddings(self) -> Any:
        """Return the head, or None."""

    def get_decoder(self) -> Any:
        """Return the module before the head; its output has `last_hidden_state`, (batch, tokens, hidden_size)."""

    def init_continuous_batching(self, *, generation_config: Any, continuous_batching_config: Any) -> Any:
        """Return a `ContinuousBatchingManager`."""

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
        """Return an output with `logits`, (batch, tokens, vocabulary)."""

    def forward(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
        """Return the same, without the model's hooks."""


def is_device_lost(model: CausalLM) -> bool:
    """Return whether a CUDA device of the model refuses all work, as after a device-side assertion.

    Only a new process can use it again. Other errors, such as a lack of memory, leave it usable.
    """
    try:
        for device in {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}:
            torch.cuda.synchronize(device)
    except RuntimeError:
        logger.exception("the device is lost")
        return True
    return False
