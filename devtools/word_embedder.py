"""Create an embedding model that compares texts by their words: `python -m devtools.word_embedder DIRECTORY FILE`.

It is a BERT whose layers add nothing, so that a text's embedding is the mean of random vectors, one for each of its
words. It needs no training and no download, and texts with words in common are near to each other.
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from devtools.tiny_poolers import SPECIAL, save_sentence_transformer, save_tokenizer

DIMENSIONS = 256
"""Enough that random vectors are nearly orthogonal."""
MAX_TOKENS = 128


def distinctive_words(texts: Sequence[str]) -> list[str]:
    """Return the words of `texts` in lower case, sorted, without those in half of the texts or more."""
    found = Counter(word for text in texts for word in set(re.findall(r"\w+", text.lower())))
    return sorted(word for word, count in found.items() if count < len(texts) / 2)


def make(directory: Path, texts: Sequence[str]) -> Path:
    """Save an embedding model whose vocabulary is the distinctive words of `texts`; every other word is ignored."""
    words = distinctive_words(texts)
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(words),
        hidden_size=DIMENSIONS,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=DIMENSIONS,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=SPECIAL.index("<pad>"),
        # All weights are zero but those of the words.
        initializer_range=0.0,
    )
    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertModel(config)
    generator = torch.Generator().manual_seed(0)
    model.embeddings.word_embeddings.weight.data[len(SPECIAL) :].normal_(generator=generator)
    model.save_pretrained(directory)
    save_tokenizer(directory, words=words, pair_types=True)
    save_sentence_transformer(
        directory, pooling={"pooling_mode_mean_tokens": True}, max_seq_length=MAX_TOKENS, do_lower_case=True
    )
    return directory


def main() -> None:
    """Save the model of a file's lines."""
    parser = argparse.ArgumentParser(description="Create an embedding model that compares texts by their words.")
    parser.add_argument("directory", type=Path, help="folder to create")
    parser.add_argument("file", type=Path, help="texts, one a line, whose words the model knows")
    arguments = parser.parse_args()
    make(arguments.directory, arguments.file.read_text().splitlines())


if __name__ == "__main__":
    main()
