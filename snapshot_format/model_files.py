"""The files of a model in the transformers format: which are loaded, and whether such a file can be loaded.

transformers loads `model.safetensors`, or else the shards that `model.safetensors.index.json` names. Other weights in
the same directory are ignored. The functions here follow that order, so that the storage initializer publishes, and
the predictor counts, the bytes that are loaded and no others.
"""

import json
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

CONFIG = "config.json"
SAFETENSORS = ".safetensors"
SINGLE = f"model{SAFETENSORS}"
INDEX_SUFFIX = ".index.json"
INDEX = f"{SINGLE}{INDEX_SUFFIX}"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", f"adapter_model{SAFETENSORS}"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
"""Files of a PEFT adapter, which has no other that is loaded."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Weights that can run code when opened."""
FOREIGN_WEIGHTS = (".gguf", ".h5", ".msgpack", ".nemo", ".onnx", ".onnx_data", ".ot", ".pb", ".pte", ".tflite")
"""Weights of other engines, never loaded."""

_SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.")
_AUXILIARY = re.compile(
    # Configurations, chat templates and vocabularies of tokenizers; license and model card.
    r"[^/]+\.(json|jinja|txt|model|model\.v\d+|tiktoken|spm|codes|tokenizer|md)"
    r"|(LICENSE|NOTICE)[^/]*"
    r"|additional_chat_templates/[^/]+\.jinja"
    # Modules of sentence-transformers, such as 1_Pooling.
    r"|\d+_[^/]+/config\.json",
    re.IGNORECASE,
)
_TRAINER_STATE = re.compile(r"(training_args|trainer|optimizer|scheduler|scaler|rng_state\w*)\.\w+")
_ADAPTER = re.compile(r"adapter_(model\.(safetensors|bin)|config\.json)")

_POINTER = b"version https://git-lfs.github.com/spec/v1"
_MAX_POINTER_BYTES = 1024
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""


def find_weights(paths: Iterable[str], single: str = SINGLE, suffixes: tuple[str, ...] = (SAFETENSORS,)) -> str | None:
    """Return the file from which weights of one format are loaded: `single`, its index, or the only other one.

    Args:
        paths: of all files, relative to the model's directory.
        single: the name that transformers expects.
        suffixes: of the format.

    Returns:
        A path at the top, or None if there is no such file or the choice is ambiguous.
    """
    top = [path for path in paths if "/" not in path]
    for path in (single, single + INDEX_SUFFIX):
        if path in top:
            return path
    others = [
        path
        for path in top
        if path.endswith(suffixes) and not (is_adapter(path) or _SHARD.search(path) or _TRAINER_STATE.fullmatch(path))
    ]
    return others[0] if len(others) == 1 else None


def read_index(index: bytes, suffix: str = SAFETENSORS) -> tuple[str, ...]:
    """Return the shards that an index names, as ordered paths relative to the model's directory.

    Raises:
        ValueError: it is not an index, or names a file of another format than `suffix` or outside the directory.
    """
    if index.startswith(_POINTER):
        raise ValueError("it is a Git LFS pointer: run git lfs pull in its clone")
    try:
        shards = sorted({posixpath.normpath(shard) for shard in json.loads(index)["weight_map"].values()})
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("it has no weight_map from tensors to files") from error
    if not shards or any(shard.startswith(("/", "../")) for shard in shards):
        raise ValueError("its weight_map is empty or names files outside the model")
    if not all(shard.endswith(suffix) for shard in shards):
        raise ValueError(f"its weight_map names files other than *{suffix}")
    return tuple(shards)


def describe_missing_weights(paths: Iterable[str]) -> str:
    """Return why `find_weights` finds no safetensors and what to do, as a sentence after the name of the model."""
    paths = sorted(paths)
    if adapters := [path for path in paths if is_adapter(path)]:
        return (
            f"is an adapter ({adapters[-1]}) without the weights of its base model. Use the base model, and set "
            "ADAPTER_REFERENCE to the adapter"
        )
    if safetensors := [path for path in paths if path.endswith(SAFETENSORS) and "/" not in path]:
        return (
            f"has neither {SINGLE} nor {INDEX}, only {_first(safetensors)}. Use a complete revision, or "
            f"rename the file to load to {SINGLE}"
        )
    others = [path for path in paths if is_weights(path)]
    fix = "Use a revision or repository that has them"
    if any(path.lower().endswith(PICKLES) for path in others):
        fix += ", or convert the weights: transformers' save_pretrained writes safetensors"
    elif any(path.lower().endswith(".gguf") for path in others):
        fix = "GGUF is not supported: use the model from which it was converted"
    found = f"only {_first(others)}" if others else "no weights at all"
    return f"has no weights as safetensors at its top ({found}). {fix}"


def is_weights(path: str) -> bool:
    """Return whether a file contains weights in any format, or is an index of weights."""
    return path.lower().removesuffix(INDEX_SUFFIX).endswith((SAFETENSORS, *PICKLES, *FOREIGN_WEIGHTS))


def is_adapter(path: str) -> bool:
    """Return whether a file belongs to a PEFT adapter."""
    return _ADAPTER.fullmatch(path) is not None


def is_auxiliary(path: str) -> bool:
    """Return whether a file belongs to the configuration, the tokenizer or the model card, by its path."""
    return _AUXILIARY.fullmatch(path) is not None and not is_weights(path) and not is_adapter(path)


def find_problem(path: Path, fix: str) -> str | None:
    """Return why a file cannot be loaded and what to do, as a sentence after its name; None if it can.

    Detects Git LFS pointers, and weights that are empty or truncated. Reads no more than the header of weights.

    Args:
        path: of any file of a model.
        fix: what to do about damaged weights.

    Raises:
        OSError: the file cannot be read.
    """
    size_bytes = path.stat().st_size
    if size_bytes <= _MAX_POINTER_BYTES and path.read_bytes().startswith(_POINTER):
        return "is a Git LFS pointer instead of the file itself. Run git lfs pull in its clone"
    if not is_weights(path.name) or path.name.endswith(INDEX_SUFFIX):
        return None
    problem = None
    if size_bytes == 0:
        problem = "is empty"
    elif path.name.endswith(SAFETENSORS):
        problem = _safetensors_problem(path, size_bytes)
    return problem and f"{problem}. {fix}"


def _safetensors_problem(path: Path, size_bytes: int) -> str | None:
    """Compare a file with its header: eight little-endian bytes of length, then JSON with the tensors' offsets."""
    with path.open("rb") as content:
        header_bytes = int.from_bytes(content.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES or size_bytes < 8:
            return "is not a safetensors file"
        header = content.read(header_bytes)
    if len(header) < header_bytes:
        return f"is truncated: {size_bytes} bytes end in its header of {header_bytes}"
    try:
        ends = [int(tensor["data_offsets"][1]) for name, tensor in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError):
        return "has a damaged safetensors header"
    expected_bytes = 8 + header_bytes + max(ends, default=0)
    if size_bytes != expected_bytes:
        return f"has {size_bytes} of {expected_bytes} bytes"
    return None


def _first(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if paths[3:] else "")
