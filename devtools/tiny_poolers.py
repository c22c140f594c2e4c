"""Create tiny models with random weights that embed or classify, in the file layouts of the Hub."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = [f"w{number}" for number in range(200)]
"""Every other word of a text is `<unk>`."""
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
CAUSAL: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 16}
PROMPTS = {"query": "w7 w8 ", "document": ""}


def save_tokenizer(
    directory: Path, *, words: Sequence[str] = WORDS, pair_types: bool = False, end_only: bool = False
) -> None:
    """Save a tokenizer of whole words.

    Args:
        directory: of the model.
        words: the vocabulary.
        pair_types: give the second text of a pair the type 1, as BERT's does.
        end_only: add only the end of a text, as decoders that embed do.
    """
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    second = ":1" if pair_types else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>" if end_only else "<s> $A </s>",
        pair=f"<s> $A </s> $B{second} </s>{second}",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if pair_types else [])],
    ).save_pretrained(directory)


def save_model(directory: Path, model_class: Any, model_type: str, **fields: Any) -> None:
    """Save a model with random weights; `fields` are of config.json, in addition to SIZES."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model(model_type, **SIZES | fields)
    model_class.from_config(config, dtype=torch.float32).save_pretrained(directory)


def save_sentence_transformer(
    directory: Path, *, pooling: dict[str, Any], normalize: bool = True, **transformer: Any
) -> None:
    """Save the files of Sentence Transformers next to a model; `transformer` is of sentence_bert_config.json."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (directory / "1_Pooling").mkdir(exist_ok=True)
    for name, content in {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 32, **pooling},
        "sentence_bert_config.json": transformer,
        "config_sentence_transformers.json": {"prompts": PROMPTS, "default_prompt_name": None},
    }.items():
        (directory / name).write_text(json.dumps(content))


def make_bert(directory: Path) -> Path:
    """Save an encoder with mean pooling, normalized, for texts of up to 24 tokens in lower case."""
    save_model(directory, transformers.AutoModel, "bert")
    save_tokenizer(directory, pair_types=True)
    save_sentence_transformer(
        directory, pooling={"pooling_mode_mean_tokens": True}, max_seq_length=24, do_lower_case=True
    )
    return directory


def make_qwen3(directory: Path) -> Path:
    """Save a decoder whose embedding is that of the last token, not normalized."""
    save_model(directory, transformers.AutoModel, "qwen3", **CAUSAL)
    save_tokenizer(directory, end_only=True)
    save_sentence_transformer(directory, pooling={"pooling_mode": "lasttoken"}, normalize=False)
    return directory


def make_classifier(directory: Path, *, labels: int = 1, model_type: str = "xlm-roberta", **fields: Any) -> Path:
    """Save a classifier; with one label it is a reranker."""
    save_model(directory, transformers.AutoModelForSequenceClassification, model_type, num_labels=labels, **fields)
    save_tokenizer(directory, pair_types=model_type == "bert")
    return directory
