"""Write a Llama of `benchmarks.make_model` as a GGUF file for llama.cpp.

All matrices are quantized to one type, except that q4_0 keeps the embedding, which is the output layer too, in q8_0:
`llama-quantize` does the same for rows that its larger blocks do not divide.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from benchmarks.peers import compressed_tensors
from kserve_llm.errors import BenchmarkError

FILE_TYPES = {"q8_0": LlamaFileType.MOSTLY_Q8_0, "q4_0": LlamaFileType.MOSTLY_Q4_0}
_EMBEDDING = "token_embd.weight"
_UNUSED_MERGE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE} w"
"""llama.cpp requires merges; prompts are token ids, so that none is applied."""


def write(model_dir: Path, target: Path, file_type: str) -> None:
    """Write the model in `model_dir` to the file `target`, as `q8_0` or `q4_0`.

    Raises:
        BenchmarkError: it is no Llama.
    """
    config = json.loads((model_dir / "config.json").read_text())
    if config["model_type"] != "llama":
        raise BenchmarkError(
            f"{model_dir} has model type {config['model_type']}; llama.cpp is compared with Llamas only. "
            "Create one with `python -m benchmarks.make_model`, or leave llama.cpp out with --peers."
        )
    writer = gguf.GGUFWriter(target, "llama")
    _add_config(writer, config, file_type)
    _add_vocabulary(writer, json.loads((model_dir / "tokenizer.json").read_text()), config)
    for name, array, quantization in _tensors(model_dir, config, GGMLQuantizationType[file_type.upper()]):
        writer.add_tensor(name, array, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any], file_type: str) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[file_type])


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([_UNUSED_MERGE])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _tensors(
    model_dir: Path, config: dict[str, Any], quantization: GGMLQuantizationType
) -> Iterator[tuple[str, "np.ndarray[Any, Any]", GGMLQuantizationType]]:
    """Yield the name, the data and the type of each tensor."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for source, tensor in compressed_tensors.read(model_dir).items():
        name = names.get_name(source, try_suffixes=(".weight",))
        array = tensor.to(torch.float32).numpy()
        if tensor.ndim == 1:
            yield name, array, GGMLQuantizationType.F32
            continue
        if number := heads.get(source.split(".")[-2]):
            array = _interleave_rope(array, number)
        kept = GGMLQuantizationType.Q8_0 if name == _EMBEDDING else quantization
        yield name, gguf.quantize(array, kept), kept


def _interleave_rope(weight: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Reorder the rows of each head: llama.cpp rotates neighboring rows, transformers those half a head apart."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
