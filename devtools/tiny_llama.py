"""Create a tiny Llama with random weights in the file layouts of the Hub."""

import shutil
from pathlib import Path

import torch
import transformers

from devtools.paths import DEMO_MODEL

LAYERS = 3
QUANTIZED = 7 * LAYERS
"""Quantized linear layers: four of attention and three of the MLP in each decoder layer."""


def make(
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    shard_size: str = "5GB",
    hidden_size: int = 64,
) -> Path:
    """Save a Llama with attention biases and the demo model's tokenizer, sharded by `shard_size`."""
    config = transformers.LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size + 9,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=512,
        max_position_embeddings=256,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory, max_shard_size=shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, directory)
    return directory
