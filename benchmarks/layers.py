"""Measure forward passes in 8 bits with fused decoder layers and packed experts, against transformers' own layers.

Both have packed linear layers. The models have random weights and the proportions of known ones. Passes alternate;
printed are medians of CPU time in one thread, so that neighbours matter little, and the ratio's quartiles over the
pairs, as a Markdown table. A pass has sequences of one token, or one prompt, without a KV cache.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from predictor.kernels.cpu import decoder_layer, experts, linear
from predictor.models.int8_quantizer import Int8Config

SHAPES: dict[str, dict[str, Any]] = {
    # Gemma 3 270M, but for its vocabulary of 262,144.
    "gemma3_text": {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 32000,
    },
    # Qwen3-30B-A3B, narrower: 0.3 B parameters, of which a token uses 0.1 B.
    "qwen3_moe": {
        "hidden_size": 1024,
        "moe_intermediate_size": 256,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 10,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32000,
    },
}
INPUTS = ((1, 1), (8, 1), (32, 1), (1, 256))
"""Sequences, and tokens of each."""


def load(directory: Path, *, fuses: bool) -> Any:
    """Load a model in 8 bits, and pack it. Without fused layers experts stay in bfloat16, which transformers needs."""
    config = Int8Config(None if fuses else ["experts"])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, quantization_config=config).eval()
    if fuses:
        decoder_layer.fuse(model)
    linear.pack_linear_layers(model, model.get_output_embeddings())
    if fuses:
        experts.pack(model)
    return model


def milliseconds(model: Any, input_ids: torch.Tensor) -> float:
    """CPU time of a forward pass."""
    start = time.thread_time()
    with torch.inference_mode():
        model(input_ids, use_cache=False)
    return 1000 * (time.thread_time() - start)


def measure(models: dict[str, Any], input_ids: torch.Tensor, pairs: int) -> str:
    """Return the cells of a row: medians, and the ratio."""
    for model in models.values():
        milliseconds(model, input_ids)
    durations = [{name: milliseconds(model, input_ids) for name, model in models.items()} for _ in range(pairs)]
    first, median, third = statistics.quantiles([pair["plain"] / pair["fused"] for pair in durations], n=4)
    medians = {name: statistics.median(pair[name] for pair in durations) for name in models}
    return f"{medians['plain']:.1f} | {medians['fused']:.1f} | {median:.2f} ({first:.2f} to {third:.2f})"


def main() -> None:
    """Print a table of all models and inputs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pairs", type=int, default=7, help="passes of each kind")
    parser.add_argument("--num_hidden_layers", type=int, help="of each model; default: its own")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print("| model | sequences x tokens | plain, ms | fused, ms | ratio |\n|---|---|---|---|---|")
    for name in options.models:
        layers = {} if options.num_hidden_layers is None else {"num_hidden_layers": options.num_hidden_layers}
        torch.manual_seed(0)
        source = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(name, **SHAPES[name] | layers), dtype=torch.bfloat16
        )
        with tempfile.TemporaryDirectory() as directory:
            source.save_pretrained(directory)
            del source
            models = {kind: load(Path(directory), fuses=kind == "fused") for kind in ("plain", "fused")}
        for sequences, tokens in INPUTS:
            cells = measure(models, torch.randint(32000, (sequences, tokens)), options.pairs)
            print(f"| {name} | {sequences} x {tokens} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
