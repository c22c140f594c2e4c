"""How a snapshot turns the outputs of its model into one vector for each text, by its own files.

Sentence Transformers writes `modules.json` (Transformer, Pooling, Normalize), `1_Pooling/config.json`,
`sentence_bert_config.json` and `config_sentence_transformers.json`. Classifiers have their activation in config.json.
"""

from pathlib import Path
from typing import Any

from predictor.errors import UnsupportedModel
from predictor.models import architectures, checkpoint
from predictor.types import Pooling, Task

MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Older fields of a Pooling module by the name of the mode, in the order in which several are concatenated."""
_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "none"}


def read(directory: Path, config: Any, task: Task, *, is_causal: bool) -> Pooling:
    """Return the pooling of a snapshot.

    Without Sentence Transformers' files it is that of the last token if the attention is causal, else the mean, both
    normalized.

    Raises:
        UnsupportedModel: a file is damaged, or names what is not supported.
    """
    if task is Task.CLASSIFY:
        return Pooling(task=task, activation=_activation(directory, config))
    if not (directory / architectures.MODULES).is_file():
        return Pooling(task=task, modes=("lasttoken" if is_causal else "mean",), normalize=True)
    modes, normalize = _read_modules(directory)
    transformer = _read_optional(directory / "sentence_bert_config.json")
    prompts = _read_optional(directory / "config_sentence_transformers.json")
    names = {str(name): str(text) for name, text in (prompts.get("prompts") or {}).items()}
    default = prompts.get("default_prompt_name")
    if default is not None and default not in names:
        raise UnsupportedModel(
            f"{directory / 'config_sentence_transformers.json'} names the default prompt {default!r}, which is not "
            "among its prompts. Correct it, or download the model again."
        )
    return Pooling(
        task=task,
        modes=modes,
        normalize=normalize,
        prompts=names,
        default_prompt_name=default,
        lowercase=bool(transformer.get("do_lower_case")),
        max_tokens=transformer.get("max_seq_length"),
    )


def _read_modules(directory: Path) -> tuple[tuple[str, ...], bool]:
    """Return the modes of the Pooling module, and whether a Normalize module follows."""
    path = directory / architectures.MODULES
    modules = checkpoint.read_json_list(path)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedModel(
            f"{path} has the modules {', '.join(kinds) or 'none'}. Only Transformer, Pooling and then Normalize are "
            "supported. Serve the model with Sentence Transformers, or choose another."
        )
    if modules[0].get("path"):
        raise UnsupportedModel(
            f"{path} has the model in {modules[0]['path']!r}. Save it with a current version of Sentence Transformers, "
            "which writes it to the top of the directory."
        )
    return _read_modes(directory / str(modules[1].get("path")) / "config.json"), len(kinds) == 3


def _read_modes(path: Path) -> tuple[str, ...]:
    config = checkpoint.read_json(path)
    named = config.get("pooling_mode")
    if named is None:
        modes = tuple(name for name, old_field in MODES.items() if config.get(old_field))
    else:
        modes = (str(named),) if isinstance(named, str) else tuple(map(str, named))
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise UnsupportedModel(
            f"{path} has the pooling mode {', '.join(unknown) or 'none'}. Supported are {', '.join(MODES)}."
        )
    if config.get("include_prompt") is False:
        raise UnsupportedModel(f"{path} excludes prompts from the pooling (include_prompt), which is not supported.")
    return modes


def _activation(directory: Path, config: Any) -> str:
    """Return the activation of a classifier: Sentence Transformers' if it is named, else that of transformers."""
    named = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn") or getattr(
        config, "sbert_ce_default_activation_function", None
    )
    if named is not None:
        name = str(named).rpartition(".")[2]
        if name not in _ACTIVATIONS:
            raise UnsupportedModel(
                f"config.json in {directory} has the activation {named!r}. Supported are {', '.join(_ACTIVATIONS)}."
            )
        return _ACTIVATIONS[name]
    is_multi_label = getattr(config, "problem_type", None) == "multi_label_classification"
    return "sigmoid" if config.num_labels == 1 or is_multi_label else "softmax"


def _read_optional(path: Path) -> dict[str, Any]:
    return checkpoint.read_json(path) if path.is_file() else {}
