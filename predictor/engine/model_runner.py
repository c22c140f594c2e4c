"""Fence around the model runner of transformers' continuous batching, which computes and samples a step at once."""

from typing import Any

import torch
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.utils import stream_context


class StepRunner(ModelRunner):
    """Queues the forward pass and the sampling of a step apart.

    Args:
        processor: with its final inputs and outputs.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__(
            logit_processor=processor.logit_processor,
            cb_config=processor.cb_config,
            inputs_and_outputs=processor.inputs_and_outputs,
            cache=processor.cache,
            do_sample=processor.do_sample,
            return_logprobs=processor.return_logprobs,
        )

    def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
        self.sample(self.forward(model, batch_data), batch_data)

    def forward(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Queue a forward pass, and return the float32 logits of the rows that are sampled, (rows, vocabulary).

        Args:
            model: that computes the step.
            inputs: as of `get_model_kwargs`.
        """
        with stream_context(self.inputs_and_outputs.compute_stream):
            return self._logits(model, inputs)

    def _logits(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        rows = inputs["logits_indices"]
        if self.supports_logits_to_keep(model):
            logits: torch.Tensor = model(**inputs, logits_to_keep=rows).logits[0]
        else:
            logits = model(**inputs).logits[0, rows]
        return logits.float()

    def sample(self, logits: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Queue the sampling of a step, from the `logits` of `forward`."""
        io = self.inputs_and_outputs
        with stream_context(io.compute_stream):
            input_ids = inputs["input_ids"][0, inputs["logits_indices"]]
            scores = self.logit_processor(input_ids, logits, inputs["logits_processor_args"])
            self._sample(scores[None], io.output_ids)
