"""FlashAttention's kernel on a GPU against its reference, in the ways that engines call it."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from devtools.paths import DEMO_MODEL
from predictor.kernels import attention
from predictor.kernels.cuda import attention as cuda_attention
from predictor.kernels.cuda import reference
from predictor.models import loader
from tests.predictor.kernels.paged_layer import Allocator, attend_to

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
HEADS = [(8, 8, 64), (32, 8, 128), (28, 4, 128), (8, 1, 256), (4, 2, 32)]
"""Query heads, KV heads, features of a head."""


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    torch.manual_seed(1)


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor([0, *accumulate(values)], dtype=torch.int32, device=DEVICE)


def assert_equals_reference(*arguments: Any, **options: Any) -> None:
    actual = varlen_attn(*arguments, enable_gqa=True, **options)
    expected = reference.varlen_attn(*arguments, enable_gqa=True, **options)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
def test_kernel_is_right_with_these_heads(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert cuda_attention.kernel_failure(DEVICE, dtype, *heads) is None


@pytest.mark.parametrize("window_size", [(-1, 0), (63, 0), (1023, 0)])
def test_prompts_and_chunks_with_windows(window_size: tuple[int, int]) -> None:
    queries, keys = (5, 700, 1, 64), (5, 700, 1063, 1100)
    query = torch.randn(sum(queries), 8, 64, dtype=torch.bfloat16, device=DEVICE)
    key, value = torch.randn(2, sum(keys), 2, 64, dtype=torch.bfloat16, device=DEVICE)
    batch = lengths(*queries), lengths(*keys), max(queries), max(keys)
    assert_equals_reference(query, key, value, *batch, window_size=window_size)


@pytest.mark.parametrize(("num_kv_heads", "num_splits"), [(2, None), (8, 1)])
@pytest.mark.parametrize("sequences", [1, 3, 64])
def test_decodes_of_any_number_and_length(sequences: int, num_kv_heads: int, num_splits: int | None) -> None:
    keys = [1 + 997 * index % 3000 for index in range(sequences)]
    pages_per_sequence = 32
    """More than any has, as in a batching manager's table."""
    query = torch.randn(sequences, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    key, value = torch.randn(2, 12 * sequences, 256, num_kv_heads, 128, dtype=torch.bfloat16, device=DEVICE)
    block_table = torch.full((sequences, pages_per_sequence), -1, dtype=torch.int32, device=DEVICE)
    block_table[:, :12] = torch.randperm(12 * sequences, device=DEVICE).view(sequences, 12)
    batch = lengths(*[1] * sequences), lengths(*keys), 1, pages_per_sequence * 256
    assert_equals_reference(
        query, key, value, *batch, seqused_k=batch[1].diff(), block_table=block_table, num_splits=num_splits
    )


def test_decodes_in_a_graph_follow_arguments_that_change_in_place() -> None:
    layer = Allocator.random((8, 2, 64), page_tokens=256, pages=6, dtype=torch.bfloat16, device=DEVICE)
    block_table = torch.tensor([[[5, 1], [2, -1], [-1, -1]]], dtype=torch.int32, device=DEVICE)
    cu_seq_q, cu_seq_k = lengths(1, 1, 0), lengths(300, 7, 0)
    attend_to(layer, cu_seq_q, cu_seq_k, block_table, tokens=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend_to(layer, cu_seq_q, cu_seq_k, block_table, tokens=3)
    block_table.copy_(torch.tensor([[[3, 4], [1, 5], [2, -1]]]))
    cu_seq_q.copy_(lengths(1, 1, 1))
    cu_seq_k.copy_(lengths(512, 257, 1))
    graph.replay()
    expected = attend_to(layer, cu_seq_q.clone(), cu_seq_k.clone(), block_table.clone(), tokens=3)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("dtype", "in_place"), [("bfloat16", True), ("float32", False)])
def test_install_reads_pages_in_place_unless_in_float32(dtype: str, in_place: bool) -> None:
    model = loader.load(DEMO_MODEL, device="cuda", dtype=dtype).model
    assert attention.install(model)
    assert attention.uses_block_tables(model) is in_place
