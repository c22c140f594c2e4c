"""Create a model of a given shape with random weights, which is as fast as a trained one.

`python -m benchmarks.make_model DIR` writes config, generation config, bfloat16 safetensors and tokenizer. Token `i` is
the word `w<i>` after a space, so a text of N such words has N tokens; the last 256 tokens are bytes. No token is
special, so every generated token is visible in the text. The same seed gives the same weights.

The architecture is Llama with Qwen2's shape by default. They differ in the bias of three projections only, and for
Qwen2 transformers would always load Qwen2's tokenizer class.
"""

import argparse
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from kserve_llm.bench import WORDS, word

BYTES = 256
"""Tokens after the words."""
EOS_TOKEN_ID = 0
"""Every model declares one; its text is an ordinary word."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a model, with the names of transformers' config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 2048


SHAPES = {
    # Qwen2-0.5B: 0.36 B parameters in the layers and 0.14 B in the tied embedding.
    "0.4b": Shape(896, 4864, 24, 14, 2, 151936, 4096),
    # Llama-3.2-1B.
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, 4096),
    # Qwen2-1.5B.
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151936),
    # Mistral-7B, but for its tied embedding: 7.1 B parameters, all of which a step reads.
    "7b": Shape(4096, 14336, 32, 32, 8, 32000, 4096),
    "tiny": Shape(64, 128, 2, 4, 2, WORDS + BYTES),
}


def make(directory: Path, shape: Shape, *, seed: int = 0, device: str = "cpu") -> int:
    """Write a Llama with tied embeddings to `directory`; return its number of parameters.

    The weights are drawn on `device`: a CPU takes minutes for billions. Devices draw different ones.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(**asdict(shape), tie_word_embeddings=True, bos_token_id=None, eos_token_id=EOS_TOKEN_ID)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=EOS_TOKEN_ID, do_sample=False)
    model.save_pretrained(directory)
    make_tokenizer(shape).save_pretrained(directory)
    return int(sum(weights.numel() for weights in model.parameters()))


def parameters(shape: Shape) -> int:
    """Return the number of parameters that `make` gives a model."""
    head_dim = shape.hidden_size // shape.num_attention_heads
    attention = 2 * shape.hidden_size * head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    return shape.vocab_size * shape.hidden_size + shape.num_hidden_layers * layer + shape.hidden_size


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with one token per word that follows a space, ` w0`, ` w1` and so on.

    The last 256 tokens are the bytes, for all other text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Byte-level BPE writes a space as this letter.
    words = [
        word(index).replace(" ", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")
        for index in range(shape.vocab_size - BYTES)
    ]
    vocabulary = {token: index for index, token in enumerate([*words, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=shape.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Create the model that the flags describe."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.make_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.4b", help="base shape (default: %(default)s)")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, help="override of the shape")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device that draws the weights (default: %(default)s)")
    arguments = parser.parse_args()

    overrides = {field.name: getattr(arguments, field.name) for field in fields(Shape)}
    shape = replace(SHAPES[arguments.shape], **{name: value for name, value in overrides.items() if value is not None})
    if shape.vocab_size < WORDS + BYTES:
        parser.error(f"--vocab_size is {shape.vocab_size}, but the prompts use {WORDS} words, next to {BYTES} bytes.")
    number = make(arguments.directory, shape, seed=arguments.seed, device=arguments.device)
    print(f"{number:,} parameters in {arguments.directory}")


if __name__ == "__main__":
    main()
