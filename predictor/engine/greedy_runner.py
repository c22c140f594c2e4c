"""Fence around the model runner of transformers' continuous batching: greedy steps on a CPU make no logits.

Where every row takes its largest logit, the LM head finds it while it multiplies. Writing the logits of a large
vocabulary, and reading them to find the largest, takes longer than some layers.
"""

from typing import Any

import torch

from predictor.engine.model_runner import StepRunner
from predictor.engine.step_sampler import StepSampler
from predictor.kernels.cpu.linear import LMHead


class GreedyRunner(StepRunner):
    """Computes steps, and lets the LM head choose the tokens of those that are greedy.

    Args:
        processor: the batching manager's.
        lm_head: of the model; None: it has another one, and all steps make logits.
        sampler: of the steps.
    """

    def __init__(self, processor: Any, lm_head: LMHead | None, sampler: StepSampler) -> None:
        super().__init__(processor, lambda: False)
        self._lm_head = lm_head
        self._sampler = sampler
        self._returns_head_outputs = None if lm_head else False
        """Whether the model's logits are the outputs of its LM head, unchanged; unknown before the first step."""

    def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
        token_ids = self.choose(model, batch_data)
        if token_ids is None:
            super().compute_batch(model, batch_data)
            return
        self.inputs_and_outputs.output_ids[0, : len(token_ids)].copy_(token_ids)
        self._sampler.step_count += 1

    def choose(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Compute a greedy step, and return the tokens of its rows, (rows,); None: the step has to make logits.

        Args:
            model: that computes the step.
            inputs: as of `get_model_kwargs`.
        """
        if self._lm_head is None or not self._returns_head_outputs or self._sampler.needs_logits:
            return None
        return self._lm_head.largest(lambda: self._compute(model, inputs), self._sampler.embedding_rows)

    def forward(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._lm_head is None or self._returns_head_outputs is not None:
            return super().forward(model, inputs)
        outputs: list[torch.Tensor] = []
        hook = self._lm_head.register_forward_hook(lambda _module, _arguments, output: outputs.append(output))
        try:
            logits = super().forward(model, inputs)
        finally:
            hook.remove()
        # Some models scale them, or cap them, which may make different logits equal.
        self._returns_head_outputs = (
            self.supports_logits_to_keep(model)
            and [output.data_ptr() for output in outputs] == [logits.data_ptr()]
            and outputs[0]._version == 0
        )
        return logits
