"""Makes a Llama of random weights, as small as one can be, in the shapes in which models come from the Hub."""

import shutil
from pathlib import Path

import torch
import transformers

from devtools.processes import ROOT

DEMO_MODEL = ROOT / "demo" / "model"
LAYERS = 3
ROUNDED = 7 * LAYERS
"""Linear layers that are rounded: four of attention and three of the MLP, in each layer."""


def make(
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    shard_size: str = "5GB",
    hidden_size: int = 64,
) -> Path:
    """Weights of this format and size in files of that size, biases in attention, and the demo model's tokenizer."""
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
