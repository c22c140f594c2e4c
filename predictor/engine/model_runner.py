"""Fence around the model runner of transformers' continuous batching, which computes and samples a step at once."""

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.utils import pad_to_pow2, stream_context

logger = logging.getLogger(__name__)


class StepRunner(ModelRunner):
    """Queues the forward pass and the sampling of a step apart, and replays passes of decodes as CUDA graphs.

    There is a graph for each power of two of rows, and for a full batch. Rows without a sequence are padding.

    Args:
        processor: with its final inputs and outputs, an `OverlappedIOs`.
        needs_hooks: whether hooks of the model have to run in the next step, which a replay would not call.
    """

    def __init__(self, processor: Any, needs_hooks: Callable[[], bool]) -> None:
        super().__init__(
            logit_processor=processor.logit_processor,
            cb_config=processor.cb_config,
            inputs_and_outputs=processor.inputs_and_outputs,
            cache=processor.cache,
            do_sample=processor.do_sample,
            return_logprobs=processor.return_logprobs,
        )
        self._needs_hooks = needs_hooks
        self._graphs: dict[int, Graph] = {}
        """By number of rows."""
        self._logits = torch.empty(0)
        """Result of all graphs, float32, (rows of the largest, vocabulary)."""

    def maybe_pad_inputs(self, num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool) -> tuple[int, int]:
        self.pad_inputs = bool(self._graphs) and use_decode_fast_path and not self._needs_hooks()
        padded: tuple[int, int] = super().maybe_pad_inputs(num_q_tokens, max_kv_read, use_decode_fast_path)
        return padded

    def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
        self.sample(self.forward(model, batch_data), batch_data)

    def forward(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Queue a forward pass, and return the float32 logits of the rows that are sampled, (rows, vocabulary).

        Args:
            model: that computes the step.
            inputs: as of `get_model_kwargs`.
        """
        with stream_context(self.inputs_and_outputs.compute_stream):
            if not self.pad_inputs:
                return self._compute(model, inputs).float()
            self._graphs[inputs["input_ids"].shape[1]].replay()
            return self._logits[: len(self.inputs_and_outputs.requests_in_batch)]

    def sample(self, logits: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Queue the sampling of a step, from the `logits` of `forward`."""
        io = self.inputs_and_outputs
        with stream_context(io.compute_stream):
            input_ids = inputs["input_ids"][0, inputs["logits_indices"][: len(logits)]]
            scores = self.logit_processor(input_ids, logits, inputs["logits_processor_args"])
            self._sample(scores[None], io.output_ids)

    def capture(self, model: Any) -> None:
        """Capture the graphs. Without them, if that fails, every step is computed as before, and the log says why."""
        rows = 1
        sizes = [rows]
        while rows < self.cb_config.max_requests_per_batch:
            rows = pad_to_pow2(rows + 1, self.cb_config.max_requests_per_batch)
            sizes.append(rows)
        began, free_bytes = time.perf_counter(), _free_bytes(model.device)
        try:
            with torch.no_grad():
                # The largest first, whose memory the others share.
                for rows in reversed(sizes):
                    self._graphs[rows] = self._capture(model, rows)
        # Copies to the host cannot be captured, in the choice of experts for example. The warm-up reports other errors.
        except Exception as error:  # noqa: BLE001
            self._graphs = {}
            self._logits = torch.empty(0)
            logger.warning("no CUDA graphs, so short steps take longer: %s", str(error).partition("\n")[0])
            return
        seconds, used_bytes = time.perf_counter() - began, free_bytes - _free_bytes(model.device)
        logger.info("%d CUDA graphs, %.0f MiB, captured in %.1f s", len(sizes), used_bytes / 2**20, seconds)

    def _compute(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        rows = inputs["logits_indices"]
        if self.supports_logits_to_keep(model):
            logits: torch.Tensor = model(**inputs, logits_to_keep=rows).logits[0]
        else:
            logits = model(**inputs).logits[0, rows]
        return logits

    def _capture(self, model: Any, rows: int) -> "Graph":
        io = self.inputs_and_outputs
        inputs = io.get_padding(rows)
        # Before the capture: kernels are loaded and chosen in the first pass.
        with stream_context(io.compute_stream):
            logits = self._compute(model, inputs)
            if not self._logits.numel():
                self._logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        pool = next((graph.pool() for graph in self._graphs.values()), None)
        return record(lambda: self._logits[:rows].copy_(self._compute(model, inputs)), io.compute_stream, pool)


class Graph(Protocol):
    """The part of `torch.cuda.CUDAGraph` that is used here."""

    def replay(self) -> None:
        """Queue the captured work again."""

    def pool(self) -> Any:
        """Return the memory in which the graph keeps its tensors."""


def record(compute: Callable[[], Any], stream: Any, pool: Any) -> Graph:
    """Capture the work that `compute` queues on a CUDA stream.

    Args:
        compute: whose result is not kept: graphs of one pool overwrite each other's tensors.
        stream: on which the graph is replayed, too.
        pool: of another graph; None: a new one.

    Raises:
        RuntimeError: some of the work cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[stream.device.index]
    state = generator.clone_state()
    # If the capture cannot be ended, torch restores neither the current stream nor the generator.
    with torch.cuda.stream(stream):
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                compute()
        except RuntimeError:
            generator.graphsafe_set_state(state)
            raise
    captured: Graph = graph
    return captured


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
