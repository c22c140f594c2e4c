"""FlashAttention over the pages of real engines, with the reference in place of the kernel, in float32.

Tokens are those of engines that compute each sequence by itself, and of forward passes without a KV cache.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from devtools import architectures
from predictor.engine import batching_manager
from predictor.engine.engine import Engine
from predictor.kernels import attention
from predictor.kernels.cuda import attention as cuda_attention
from predictor.kernels.cuda import reference as kernel_reference
from predictor.models import loader
from predictor.models.loader import LoadedModel
from tests.predictor.engine.conftest import (
    GREEDY,
    assert_logprobs,
    generate,
    generate_all,
    load,
    random_ids,
    read,
    started,
)

CHUNK = 128
"""Tokens per step."""


@dataclass(frozen=True, slots=True)
class KernelCall:
    max_q: int
    num_splits: int | None
    pages: list[list[int]]
    """Of each sequence; empty without a block table."""


@dataclass
class Kernel:
    """The reference, with a record of its calls."""

    calls: list[KernelCall] = field(default_factory=list)

    def __call__(self, query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        key, *_, max_q, _ = arguments
        tables, lengths = options.get("block_table"), options.get("seqused_k")
        pages = []
        if tables is not None and lengths is not None:
            counts = (lengths + key.shape[1] - 1) // key.shape[1]
            pages = [row[:count] for row, count in zip(tables.tolist(), counts.tolist(), strict=True)]
        self.calls.append(KernelCall(max_q, options.get("num_splits"), pages))
        return kernel_reference.varlen_attn(query, *arguments, **options)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel()
        patch.setattr(cuda_attention, "varlen_attn", kernel)
        yield kernel


@pytest.fixture(scope="module", params=[256, 8])
def page_tokens(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@contextmanager
def choosing_block_tables(page_tokens: int) -> Iterator[None]:
    """Engines that start here use the kernel, and pages of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_attention, "unavailable_reason", lambda _: None)
        patch.setattr(batching_manager, "PAGE_TOKENS", page_tokens)
        yield


@contextmanager
def started_with_block_tables(loaded: LoadedModel, page_tokens: int, **changes: Any) -> Iterator[Engine]:
    with ExitStack() as stack:
        with choosing_block_tables(page_tokens):
            running = stack.enter_context(started(loaded, max_num_batched_tokens=CHUNK, **changes))
        assert attention.uses_block_tables(loaded.model)
        yield running


@pytest.fixture(scope="module")
def paged_model(kernel: Kernel) -> LoadedModel:
    del kernel
    return load()


@pytest.fixture(scope="module")
def paged(paged_model: LoadedModel, page_tokens: int) -> Iterator[Engine]:
    with started_with_block_tables(paged_model, page_tokens) as running:
        yield running


def prompts_around(model: LoadedModel, lengths: Sequence[int]) -> list[list[int]]:
    return [random_ids(model, length, seed=7000 + length) for length in lengths]


def test_tokens_equal_forward_passes_at_page_boundaries_and_in_chunks(
    paged: Engine, engine: Engine, reference: LoadedModel, kernel: Kernel
) -> None:
    kernel.calls.clear()
    prompts = prompts_around(reference, [1, 7, 8, 9, 130, 250, 255, 256, 257, 400])
    sampling = replace(GREEDY, max_tokens=12, ignore_eos=True, logprobs=1)
    answers = generate_all(paged, [(ids, sampling) for ids in prompts])
    expected = generate_all(engine, [(ids, sampling) for ids in prompts])
    for ids, answer, by_sequence in zip(prompts, answers, expected, strict=True):
        assert answer.token_ids == by_sequence.token_ids
        assert_logprobs(reference, ids, answer, top=1)
    chunks = [call for call in kernel.calls if call.pages and call.max_q > 1]
    decodes = [call for call in kernel.calls if call.pages and call.max_q == 1]
    assert any(len(call.pages) > 1 for call in chunks), "chunks and decodes in one step"
    assert {call.num_splits for call in chunks} == {1}
    assert {call.num_splits for call in decodes} == {None}
    assert max(len(pages) for call in decodes for pages in call.pages) > 1


def test_common_prefix_is_read_from_the_same_pages(
    paged: Engine, engine: Engine, kernel: Kernel, page_tokens: int, paged_model: LoadedModel
) -> None:
    sampling = replace(GREEDY, max_tokens=4, ignore_eos=True)
    prefix = random_ids(paged_model, 300, seed=7000)
    prompts = [[*prefix, first, 9] for first in (6, 7)]
    generate(paged, prefix, sampling)
    kernel.calls.clear()
    assert generate_all(paged, [(ids, sampling) for ids in prompts]) == generate_all(
        engine, [(ids, sampling) for ids in prompts]
    )
    first, second = kernel.calls[-1].pages
    shared = len(prefix) // page_tokens
    assert shared > 0
    assert first[:shared] == second[:shared]
    assert not {*first[shared:]} & {*second[shared:]}


def test_cancelled_neighbours_do_not_change_tokens(paged: Engine, engine: Engine, paged_model: LoadedModel) -> None:
    sampling = replace(GREEDY, max_tokens=40, ignore_eos=True)
    prompts = prompts_around(paged_model, [20, 21, 260, 22, 130, 131])

    async def cancel_half() -> list[list[int]]:
        streams = paged.submit([(ids, sampling) for ids in prompts])
        kept = [asyncio.ensure_future(read(stream)) for stream in streams[1::2]]
        for stream in streams[::2]:
            await anext(stream)
            stream.close()
        later = paged.submit([(prompts[0], sampling)])
        return [(await answer).token_ids for answer in [*kept, asyncio.ensure_future(read(later[0]))]]

    expected = generate_all(engine, [(ids, sampling) for ids in [*prompts[1::2], prompts[0]]])
    assert asyncio.run(cancel_half()) == [answer.token_ids for answer in expected]


@pytest.mark.parametrize("page_tokens", [8], indirect=True)
def test_sequences_that_leave_a_full_cache_keep_their_tokens(
    paged_model: LoadedModel, engine: Engine, page_tokens: int
) -> None:
    prompts = prompts_around(paged_model, [40, 200, 255, 256, 257, 400])
    sampling = replace(GREEDY, max_tokens=60, ignore_eos=True)
    with started_with_block_tables(paged_model, page_tokens, kv_cache_tokens=1024) as small:
        answers = generate_all(small, [(ids, sampling) for ids in prompts])
    assert answers == generate_all(engine, [(ids, sampling) for ids in prompts])


@pytest.mark.parametrize("page_tokens", [8], indirect=True)
@pytest.mark.parametrize("name", ["mistral, sliding window", "gemma3_text"])
def test_layers_with_a_window_give_the_tokens_of_generate(
    name: str, kernel: Kernel, page_tokens: int, tmp_path: Path
) -> None:
    kernel.calls.clear()
    architectures.save_model(architectures.CASES[name], tmp_path)
    loaded = loader.load(tmp_path, device="cpu", dtype="float32")
    with choosing_block_tables(page_tokens):
        tokens = architectures.generate_with_engine(loaded)
    assert tokens == architectures.generate_with_transformers(tmp_path)
    assert attention.uses_block_tables(loaded.model)
    assert any(call.pages for call in kernel.calls) is (name == "gemma3_text"), "gemma3 has layers of both types"
