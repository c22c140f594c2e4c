"""Decodes replayed from static inputs, on a CPU: a graph computes its forward pass again, without the model's hooks."""

import asyncio
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from devtools import architectures
from predictor.engine import batching_manager, model_runner
from predictor.engine.engine import Engine
from predictor.kernels.cuda import attention as cuda_attention
from predictor.kernels.cuda import reference as kernel_reference
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.types import SamplingParams
from tests.predictor.engine.conftest import (
    GREEDY,
    SAMPLED,
    Generated,
    generate,
    generate_all,
    load,
    random_ids,
    read,
    started,
    until_idle,
)
from tests.predictor.engine.test_step_pipeline import assert_idle, assert_same, mixed_requests
from tests.predictor.servers import HANG_SECONDS

TEN = replace(GREEDY, max_tokens=10, ignore_eos=True)
PAGE_TOKENS = 16


@dataclass
class Graphs:
    """Captures instead of CUDA's."""

    model: Any = None
    captured: int = 0
    replays: Counter[int] = field(default_factory=Counter)
    """By graph, in the order of their capture."""

    def record(self, compute: Callable[[], Any], stream: Any, pool: Any) -> Any:
        assert (stream, pool) == (None, "pool" if self.captured % 4 else None)
        number, self.captured = self.captured, self.captured + 1

        def replay() -> None:
            self.replays[number] += 1
            decoder = self.model.get_decoder()
            hooks, decoder._forward_hooks = decoder._forward_hooks, type(decoder._forward_hooks)()
            try:
                compute()
            finally:
                decoder._forward_hooks = hooks

        return SimpleNamespace(replay=replay, pool=lambda: "pool")


@contextmanager
def started_with_graphs(loaded: LoadedModel, record: Callable[..., Any], **changes: Any) -> Iterator[Engine]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_attention, "unavailable_reason", lambda _: None)
            patch.setattr(batching_manager, "PAGE_TOKENS", PAGE_TOKENS)
            patch.setattr(batching_manager, "_overlaps", lambda _: True)
            patch.setattr(model_runner, "record", record)
            engine = stack.enter_context(started(loaded, **changes))
        yield engine


def kernel(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    _, _, cu_seq_q, cu_seq_k, max_q, _ = arguments
    if options.get("block_table") is not None and max_q == 1:
        assert cu_seq_q.tolist() == list(range(len(query) + 1)), "a kernel leaves rows without queries undefined"
        assert bool((cu_seq_k.diff() > 0).all()), "and those without keys"
    return kernel_reference.varlen_attn(query, *arguments, **options)


@pytest.fixture(scope="module")
def paged() -> Iterator[LoadedModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_attention, "varlen_attn", kernel)
        yield load()


@pytest.fixture(scope="module")
def graphs(paged: LoadedModel) -> Graphs:
    return Graphs(paged.model)


@pytest.fixture(scope="module")
def replayed(paged: LoadedModel, graphs: Graphs) -> Iterator[Engine]:
    """Batches of 7 sequences, which is not a power of two."""
    with started_with_graphs(paged, graphs.record, max_num_seqs=7) as running:
        yield running


def test_replayed_decodes_give_the_tokens_of_computed_ones(
    replayed: Engine, engine: Engine, graphs: Graphs, loaded: LoadedModel
) -> None:
    requests = mixed_requests(loaded)
    graphs.replays.clear()
    assert_same(generate_all(replayed, requests), generate_all(engine, requests))
    assert graphs.captured == 4, "of 7, 4, 2 and 1 rows"
    assert set(graphs.replays) >= {0, 1}, "of a full batch, and of some sequences less"
    assert_idle(replayed)


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_padding_does_not_change_sequences(
    replayed: Engine, engine: Engine, graphs: Graphs, loaded: LoadedModel, count: int
) -> None:
    """Around the ends of pages, next to the page of the padding."""
    requests: list[tuple[list[int], SamplingParams]] = [
        (random_ids(loaded, PAGE_TOKENS - 3 + seed, seed), replace(SAMPLED, seed=seed)) for seed in range(count)
    ]
    graphs.replays.clear()
    assert generate_all(replayed, requests) == generate_all(engine, requests)
    assert graphs.replays[{1: 3, 3: 1, 5: 0, 7: 0}[count]] > 15


@pytest.mark.parametrize("prompt_logprobs", [None, 2])
def test_chunks_of_one_token_are_replayed_unless_scored(
    paged: LoadedModel, engine: Engine, loaded: LoadedModel, prompt_logprobs: int | None
) -> None:
    """Six sequences leave one token of each step to a prompt, whose chunks look like decodes."""
    ids = random_ids(loaded, 12, seed=72)
    others = [(random_ids(loaded, 9, seed), replace(TEN, max_tokens=400)) for seed in range(6)]
    scored = replace(TEN, prompt_logprobs=prompt_logprobs)
    graphs = Graphs(paged.model)

    async def run(running: Engine) -> Generated:
        streams = running.submit(others)
        for stream in streams:
            await anext(stream)
        [stream] = running.submit([(ids, scored)])
        answer = await read(stream)
        for other in streams:
            other.close()
        await until_idle(running)
        return answer

    with started_with_graphs(paged, graphs.record, max_num_seqs=7, max_num_batched_tokens=7) as narrow:
        before = narrow.steps
        answer = asyncio.run(asyncio.wait_for(run(narrow), HANG_SECONDS))
        steps = narrow.steps - before
    assert_same([answer], [generate(engine, ids, scored)])
    # The others' prompts take at least 8 steps of 7 tokens.
    assert graphs.replays.total() <= steps - 8 - (11 if prompt_logprobs else 0)
    assert graphs.replays.total() >= 9


def test_chunks_of_prompts_are_computed(replayed: Engine, graphs: Graphs, loaded: LoadedModel) -> None:
    graphs.replays.clear()
    generate(replayed, random_ids(loaded, 300, seed=70), replace(TEN, max_tokens=1))
    assert graphs.replays.total() == 0


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_failed_capture_leaves_an_engine_without_graphs(
    paged: LoadedModel, engine: Engine, loaded: LoadedModel, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    captures = 0

    def fail(*_: Any) -> Any:
        nonlocal captures
        captures += 1
        if captures == 2:
            raise error("operation not permitted when stream is capturing\nMore.")
        return SimpleNamespace(replay=None, pool=lambda: None)

    request = (random_ids(loaded, 20, seed=71), TEN)
    with started_with_graphs(paged, fail) as eager:
        assert generate_all(eager, [request]) == generate_all(engine, [request])
    assert captures == 2
    assert "no CUDA graphs, so short steps take longer: operation not permitted when stream is capturing" in caplog.text
    assert "More." not in caplog.text


def test_stopped_engine_frees_its_cache_and_graphs(paged: LoadedModel, graphs: Graphs) -> None:
    with started_with_graphs(paged, graphs.record, max_num_seqs=7) as stopping:
        generate(stopping, [5, 6], TEN)
        cache = weakref.ref(stopping._executor._manager.batch_processor.cache)  # type: ignore[attr-defined]
        stopping.stop()
        assert cache() is None


def test_enforce_eager_captures_nothing(paged: LoadedModel, graphs: Graphs) -> None:
    before = graphs.captured
    with started_with_graphs(paged, graphs.record, enforce_eager=True):
        assert graphs.captured == before


@pytest.mark.parametrize("name", ["mistral, sliding window", "gemma3_text"])
def test_layers_with_a_window_are_not_captured(paged: LoadedModel, name: str, tmp_path: Path) -> None:
    """Their steps have no block table."""
    graphs = Graphs(paged.model)
    architectures.save_model(architectures.CASES[name], tmp_path)
    with started_with_graphs(loader.load(tmp_path, device="cpu", dtype="float32"), graphs.record):
        assert graphs.captured == 0


@pytest.mark.parametrize(
    ("devices", "expected"), [(["cuda:0"], True), (["cuda:0", "meta"], False), (["cuda:1"], False)]
)
def test_model_is_on_one_device_if_all_parameters_are(devices: list[str], expected: bool) -> None:
    parameters = [SimpleNamespace(device=torch.device(device)) for device in devices]
    model = SimpleNamespace(device=torch.device("cuda:0"), parameters=lambda: iter(parameters))
    assert batching_manager._is_on_one_device(model) is expected
