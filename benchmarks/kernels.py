"""Measure the CPU kernels: linear layers of one step, and attention of one layer.

Shapes are those of Qwen2.5-0.5B. Prints medians in milliseconds as Markdown tables.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch

from predictor.kernels.cpu import gemm, ops
from predictor.kernels.cpu.gemm import LinearKernel
from snapshot_format import int4
from snapshot_format.recipe import INT4_GROUP_SIZE

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 896, 4864, 24, 151936
HEADS, KV_HEADS, HEAD_DIM, KEYS = 14, 2, 64, 100
LONG_KEYS, CACHE_LAYERS, PAGE_TOKENS = 2048, 8, 256
LINEARS = [
    *[(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM), (HIDDEN, HIDDEN), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
    * LAYERS,
    (HIDDEN, VOCABULARY),
]
"""In and out features of the linear layers of a step, the LM head last."""
BF16_PREFIX = "bf16_"
"""Before the instruction set in the name of a backend with bfloat16 weights."""
INT4_PREFIX = "int4_"
"""Before the instruction set in the name of a backend with int4 weights; int8 backends have none."""


def milliseconds(function: Callable[[], object], repetitions: int) -> float:
    """Median duration of a call, after one warm-up call."""
    durations = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        function()
        durations.append(1000 * (time.perf_counter() - start))
    return statistics.median(durations[1:])


def select(backend: str) -> None:
    """Use the instruction set of a backend's name."""
    if backend.startswith(BF16_PREFIX):
        ops.bf16_isa = backend.removeprefix(BF16_PREFIX)
    elif (isa := backend.removeprefix(INT4_PREFIX)) in ops.CPU_ISAS:
        ops.cpu_isa = isa


def build_linears(backend: str) -> list[LinearKernel]:
    """Pack all linear layers of a step with random weights; with int4 weights, the LM head has int8 ones."""
    kernels: list[LinearKernel] = []
    for in_features, out_features in LINEARS:
        weight = torch.randn(out_features, in_features, dtype=torch.bfloat16)
        if backend == "onednn":
            kernels.append(gemm.OneDNNBf16Linear(weight, None))
        elif backend.startswith(BF16_PREFIX):
            kernels.append(gemm.NativeBf16Linear(weight, None))
        elif backend.startswith(INT4_PREFIX) and out_features != VOCABULARY:
            packed, scale = int4.quantize(weight)
            kernels.append(gemm.make_int4_linear(int4.unpack(packed), scale, None, INT4_GROUP_SIZE, None))
        else:
            make = gemm.FbgemmInt8Linear if backend == "fbgemm" else gemm.NativeInt8Linear
            kernels.append(make(*gemm.quantize_per_channel_int8(weight), None))
    return kernels


def measure_linears(backends: list[str], token_counts: list[int], repetitions: int) -> None:
    """Print a row per backend: its median, and the median of its speed relative to the first backend's next to it.

    Backends run in turns. Above 32 tokens the LM head is left out, as in prefill.
    """
    linears = {backend: build_linears(backend) for backend in backends}
    print("| backend |", *(f"{tokens} tokens |" for tokens in token_counts))
    print("|---|" + "---|" * len(token_counts))
    cells: dict[str, list[str]] = {backend: [] for backend in backends}
    for tokens in token_counts:
        inputs = {size: torch.randn(tokens, size) for size in (HIDDEN, INTERMEDIATE)}
        durations: dict[str, list[float]] = {backend: [] for backend in backends}
        for _ in range(repetitions):
            for backend in backends:
                steps = list(zip(linears[backend], LINEARS, strict=True))[: None if tokens <= 32 else -1]
                select(backend)
                durations[backend].append(milliseconds(functools.partial(_step, steps, inputs), 1))
        for backend, own in durations.items():
            ratios = [first / value for first, value in zip(durations[backends[0]], own, strict=True)]
            cells[backend].append(f"{statistics.median(own):.1f} ({statistics.median(ratios):.2f} x) |")
    for backend, row in cells.items():
        print(f"| {backend} |", *row)


def _step(steps: list[tuple[LinearKernel, tuple[int, int]]], inputs: dict[int, torch.Tensor]) -> None:
    for kernel, (in_features, _) in steps:
        kernel.forward(inputs[in_features])


def measure_attention(sequences: int, past: int, queries: int, repetitions: int) -> None:
    """Print the duration of one layer in C, and with torch: keys gathered, and masks where they are needed.

    Args:
        sequences: in the step.
        past: tokens of each before the step.
        queries: tokens of each in the step.
        repetitions: of which the median is printed; C and torch in turns.
    """
    slots, scale = sequences * past, HEAD_DIM**-0.5
    key_cache, value_cache = torch.randn(2, slots + 1, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16).unbind()
    query = torch.randn(sequences * queries, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    key, value = torch.randn(2, sequences * queries, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16).unbind()
    mapping = torch.randperm(slots)
    places = torch.tensor([[seq * queries, past, 0, seq * past] for seq in range(sequences)])
    size = ops.ATTENTION_ROWS // (HEADS // KV_HEADS)
    tiles = torch.tensor(
        [[seq, q, min(size, queries - q)] for q in reversed(range(0, queries, size)) for seq in range(sequences)]
    )
    mask = None if queries == 1 else torch.ones(queries, past + queries, dtype=torch.bool).tril(past)

    def by_sdpa() -> torch.Tensor:
        keys, values = (
            torch.cat((cache[mapping].unflatten(0, (sequences, past)), new.unflatten(0, (sequences, queries))), 1)
            for cache, new in ((key_cache, key), (value_cache, value))
        )
        states = (part.transpose(1, 2) for part in (query.unflatten(0, (sequences, queries)), keys, values))
        is_causal = past == 0 and queries > 1
        return torch.nn.functional.scaled_dot_product_attention(
            *states, attn_mask=None if is_causal else mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )

    def in_c() -> torch.Tensor:
        indices = {"slot_mapping": mapping, "sequences": places, "tiles": tiles}
        return ops.paged_attention(query, key, value, key_cache, value_cache, scale=scale, **indices)

    durations: dict[str, list[float]] = {"C": [], "torch": []}
    for _ in range(repetitions):
        durations["torch"].append(milliseconds(by_sdpa, 1))
        if ops.cpu_isa:
            durations["C"].append(milliseconds(in_c, 1))
    figures = {name: f"{statistics.median(values):.3f}" if values else "-" for name, values in durations.items()}
    print(f"| {sequences} | {past} | {queries} |", *(f"{figure} |" for figure in figures.values()))


def measure_cache_dtypes(sequences: int, past: int, repetitions: int) -> None:
    """Print the duration of attention in C in a layer of decodes, with a KV cache of bfloat16 and of int8.

    Layers have caches of their own, as in a model, so that keys come from memory and not from the processor's caches.
    Quantizing the new keys and values is included. The ratio is the median of pairs measured one after another.
    """
    slots, scale = sequences * past, HEAD_DIM**-0.5
    caches = [torch.randn(2, slots, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(CACHE_LAYERS)]
    int8_caches = [ops.quantize_kv(*cache) for cache in caches]
    query = torch.randn(sequences, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    new = torch.randn(2, sequences, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    indices = {
        # Pages of the engine are contiguous, and in any order.
        "slot_mapping": torch.arange(slots).view(-1, PAGE_TOKENS)[torch.randperm(slots // PAGE_TOKENS)].flatten(),
        "sequences": torch.tensor([[seq, past, 0, seq * past] for seq in range(sequences)]),
        "tiles": torch.tensor([[seq, 0, 1] for seq in range(sequences)]),
    }

    def in_bfloat16() -> None:
        for cache in caches:
            ops.paged_attention(query, *new, *cache, scale=scale, **indices)

    def in_int8() -> None:
        for cache in int8_caches:
            ops.paged_attention(query, *ops.quantize_kv(*new), *cache, scale=scale, **indices)

    pairs = [(milliseconds(in_bfloat16, 1), milliseconds(in_int8, 1)) for _ in range(repetitions)]
    own, other = (statistics.median(durations) / CACHE_LAYERS for durations in zip(*pairs, strict=True))
    ratio = statistics.median(first / second for first, second in pairs)
    print(f"| {sequences} | {past} | {own:.3f} | {other:.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    supported = [isa for isa in ops.CPU_ISAS[1 : ops.CPU_ISAS.index(ops.cpu_isa) + 1] if isa]
    supported_int4 = [INT4_PREFIX + isa for isa in supported]
    supported_bf16 = [BF16_PREFIX + isa for isa in ops.BF16_ISAS[1 : ops.BF16_ISAS.index(ops.bf16_isa) + 1] if isa]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--backends", nargs="+", default=[*supported, *supported_int4, *supported_bf16, "onednn", "fbgemm"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 256])
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    with torch.inference_mode():
        print("| sequences | tokens before the step | tokens of the step | C, ms | torch, ms |\n|---|---|---|---|---|")
        for shape in ((8, KEYS, 1), (32, KEYS, 1), (8, 4 * KEYS, 8), (1, 0, 128), (1, 0, 512), (1, 0, 2048)):
            measure_attention(*shape, arguments.repetitions)
        if ops.cpu_isa:
            print("\n| sequences | tokens before the step | bfloat16, ms | int8, ms | ratio |\n|---|---|---|---|---|")
            for sequences in (1, 8, 32):
                measure_cache_dtypes(sequences, LONG_KEYS, arguments.repetitions)
        measure_linears(arguments.backends, arguments.tokens, arguments.repetitions)
