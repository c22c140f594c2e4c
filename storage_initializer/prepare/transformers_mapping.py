"""Fence around transformers: the only user of its undocumented weight mapping and quantizer helpers.

`tests/contracts/test_upstream.py` checks the assumptions.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

VERSION = transformers.__version__


class UnsupportedModel(Exception):
    """transformers cannot build the model without remote code."""


def load_config(directory: Path) -> Any:
    """Load the configuration of a model without remote code.

    Raises:
        UnsupportedModel: it is not a configuration of this version of transformers.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedModel from error


def build_meta_model(config: Any) -> Any:
    """Build a causal language model without weights.

    Raises:
        UnsupportedModel: transformers has no such model.
    """
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedModel from error


def linear_layers(model: Any, skip_modules: Sequence[str], group_size: int) -> list[str]:
    """Return the names of the linear layers that transformers would quantize.

    Args:
        model: a model on the meta device.
        skip_modules: further patterns, as in transformers' `modules_to_not_convert`.
        group_size: a divisor of the layers' inputs.
    """
    not_converted = HfQuantizer.get_modules_to_not_convert(
        model, list(skip_modules), model._keep_in_fp32_modules, add_default_skips=True
    )
    return [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and module.in_features % group_size == 0
        and should_convert_module(name, not_converted)
    ]


def parameter_mapping(model: Any, added: Mapping[str, object]) -> Callable[[str], str]:
    """Return the mapping from stored names to the parameters that are loaded from them unchanged.

    The mapping returns an empty string for tensors that are converted while they are loaded, and for unknown names.

    Args:
        model: a model on the meta device.
        added: names of parameters that the model gets by quantization.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = {**model.state_dict(), **added}

    def parameter_name(stored: str) -> str:
        parameter, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, parameters)
        return parameter if converter is None and parameter in parameters else ""

    return parameter_name
