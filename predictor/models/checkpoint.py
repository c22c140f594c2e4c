"""Read and check a checkpoint directory: config.json, weight index, shards."""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from predictor.errors import UnsupportedModel
from predictor.models import architectures

WEIGHTS_INDEX = "model.safetensors.index.json"


def read_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """Read the transformers config of a causal language model.

    Raises:
        UnsupportedModel: config.json is damaged, or the engine cannot run the architecture.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the errors of config classes have no common base class
        model_type = _read_json(directory / "config.json").get("model_type")
        if trust_remote_code or str(model_type) in CONFIG_MAPPING:
            raise UnsupportedModel(
                f"{directory / 'config.json'} cannot be used ({first_line(error)}). Download the model again."
            ) from error
        raise UnsupportedModel(
            f"{directory / 'config.json'} names the model type {model_type!r}, which transformers "
            f"{transformers.__version__} cannot serve without remote code. Use a supported model, a newer "
            "transformers, or --trust_remote_code after reading the model's code."
        ) from error
    has_remote_code = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    architectures.check(config, directory, has_remote_code=has_remote_code)
    return config


def check_weight_files(directory: Path) -> None:
    """Check that there are safetensors files, and every shard of the index.

    Raises:
        UnsupportedModel: the index is damaged, a shard is missing, or the weights have another format.
    """
    index = directory / WEIGHTS_INDEX
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"{index} is not a readable index. Download the model again.") from error
    missing = sorted(shard for shard in shards if not (directory / shard).is_file())
    if missing:
        raise UnsupportedModel(
            f"{directory} has no {', '.join(missing)}, named in {WEIGHTS_INDEX}. Download the model again."
        )
    if not weight_files(directory):
        raise UnsupportedModel(
            f"{directory} has no *.safetensors. Only that format is loaded, since pickled weights can run code: "
            "choose a model or revision that has it."
        )


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files in the order in which they are read."""
    return sorted(directory.glob("*.safetensors"))


def check_complete(directory: Path, loading_info: dict[str, Any]) -> None:
    """Check, by `from_pretrained`'s loading info, that the files had every weight in the right shape.

    Transformers only logs such weights, and fills them with random numbers.

    Raises:
        UnsupportedModel: a weight is missing or has another shape.
    """
    names = sorted({*loading_info["missing_keys"], *(name for name, *_ in loading_info["mismatched_keys"])})
    if names:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise UnsupportedModel(
            f"The weights in {directory} do not fit its config.json (missing or of another shape: {names[0]}{more}). "
            "Download the model again."
        )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without a full stop."""
    # Config classes wrap the error of a field.
    cause = error.__cause__ if isinstance(error.__cause__, ValueError | TypeError) else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} is not a JSON object. Download the model again.")
    return content
