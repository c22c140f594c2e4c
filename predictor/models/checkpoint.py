"""Read and check a checkpoint directory: config.json, weight index, shards."""

import codecs
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from predictor.errors import UnsupportedModel
from predictor.models import architectures
from predictor.types import Task
from snapshot_format import model_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that transformers loads."""

    entry: str
    """The file that it opens first, relative to the model's directory: the only file, or the index."""
    files: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        """Total size of the files."""
        return sum(path.stat().st_size for path in self.files)


def read_config(directory: Path, *, trust_remote_code: bool, task: str = "auto") -> tuple[Any, Task]:
    """Read the transformers config of a model, and choose its task unless `task` names it.

    Raises:
        UnsupportedModel: config.json is damaged, or the architecture cannot be served for the task.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the errors of config classes have no common base class
        path = directory / model_files.CONFIG
        model_type = read_json(path).get("model_type")
        if trust_remote_code or str(model_type) in CONFIG_MAPPING:
            raise UnsupportedModel(f"{path} cannot be used ({first_line(error)}). Download the model again.") from error
        raise UnsupportedModel(
            f"{path} names the model type {model_type!r}, which transformers "
            f"{transformers.__version__} cannot serve without remote code. Use a supported model, a newer "
            "transformers, or --trust_remote_code after reading the model's code."
        ) from error
    chosen = architectures.choose_task(config, directory) if task == "auto" else Task(task)
    has_remote_code = trust_remote_code and architectures.AUTO_CLASSES[chosen] in getattr(config, "auto_map", {})
    architectures.check(config, directory, chosen, has_remote_code=has_remote_code)
    return config, chosen


def check_auxiliary_files(directory: Path) -> None:
    """Check that no file of the configuration or the tokenizer is a Git LFS pointer.

    Raises:
        UnsupportedModel: a file is a pointer.
    """
    for path in sorted(directory.iterdir()):
        if path.is_file() and model_files.is_auxiliary(path.name):
            check_file(path)


@contextmanager
def without_byte_order_marks(directory: Path) -> Iterator[Path]:
    """Yield a directory with the same files, whose JSON has no byte-order mark: transformers cannot read one.

    It is `directory` itself, or a temporary one of links and corrected copies.
    """
    marked = {path for path in directory.glob("*.json") if path.is_file() and _has_byte_order_mark(path)}
    if not marked:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="model-") as name:
        logger.warning(
            "reading copies in %s of files that begin with a byte-order mark: %s", name, ", ".join(map(str, marked))
        )
        for path in directory.iterdir():
            link = Path(name, path.name)
            if path in marked:
                link.write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
            else:
                link.symlink_to(path.resolve())
        yield Path(name)


def _has_byte_order_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def check_code(directory: Path) -> None:
    """Check that the directory contains the modules that its config.json names.

    Raises:
        UnsupportedModel: a module is missing.
    """
    classes = (read_json(directory / model_files.CONFIG).get("auto_map") or {}).values()
    # `owner/model--module.Class` is in another repository.
    modules = {name.partition(".")[0] for name in classes if isinstance(name, str) and "--" not in name}
    if missing := [f"{module}.py" for module in sorted(modules) if not (directory / f"{module}.py").is_file()]:
        raise UnsupportedModel(
            f"{directory} has no {', '.join(missing)}, the code that its config.json names. Publish the model with its "
            "code: set STORAGE_ALLOW_PATTERNS=* of the storage initializer."
        )


def find_weights(directory: Path, explicit: str | None = None) -> Weights:
    """Find the weights that transformers loads, and check the header of each file.

    Args:
        directory: of the model.
        explicit: the file that config.json names as `transformers_weights`, if it does.

    Raises:
        UnsupportedModel: there are none as safetensors, the index is damaged, or a file is missing, a Git LFS pointer,
            empty or truncated.
    """
    names = [path.name for path in directory.iterdir() if path.is_file()]
    entry = explicit or model_files.find_weights(names)
    if entry is None:
        raise UnsupportedModel(
            f"{directory} {model_files.describe_missing_weights(names)}. Pickled weights are not loaded, since they "
            "can run code."
        )
    files: tuple[Path, ...] = (directory / entry,)
    if entry.endswith(model_files.INDEX_SUFFIX):
        files = tuple(directory / shard for shard in _read_index(directory / entry))
    if missing := [str(path.relative_to(directory)) for path in files if not path.is_file()]:
        raise UnsupportedModel(f"{directory} has no {', '.join(missing)}, named in {entry}. Download the model again.")
    for path in files:
        check_file(path)
    return Weights(entry, files)


def _read_index(path: Path) -> tuple[str, ...]:
    try:
        return model_files.read_index(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} is not a readable index ({error}). Download the model again.") from error


def check_file(path: Path) -> None:
    """Check that a file is no Git LFS pointer and, if it has weights, that they are complete.

    Raises:
        UnsupportedModel: it cannot be loaded.
    """
    if problem := model_files.find_problem(path, "Download the model again"):
        raise UnsupportedModel(f"{path} {problem}.")


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


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UnsupportedModel: the file cannot be read, or is not a JSON object.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} is not a JSON object. Correct it, or download the model again.")
    return content


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of the list in a file.

    Raises:
        UnsupportedModel: the file cannot be read, or is not a JSON list of objects.
    """
    content = _read_json(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise UnsupportedModel(f"{path} is not a JSON list of objects. Correct it, or download the model again.")
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())  # of bytes, which may begin with a byte-order mark
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} cannot be read ({error}). Correct it, or download the model again.") from error
