"""Fewer bits behind one word: `none`, `8bit` or `4bit`, and what each becomes on each device.

             8bit                    4bit
    cuda     bitsandbytes LLM.int8   bitsandbytes NF4
    cpu      bitsandbytes int8       bitsandbytes NF4, both smaller but slower than bfloat16
    mps      refused                 refused

Weights are quantized while they load, by transformers' own quantizers. Weights that come quantized load as they are.
"""

import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from predictor.errors import StartupError

logger = logging.getLogger(__name__)


def config(word: str, device: torch.device, dtype: torch.dtype, of_checkpoint: Any | None) -> Any | None:
    """What `from_pretrained` takes as `quantization_config`; None where nothing is to be quantized.

    Args:
        word: "none", "8bit" or "4bit".
        device: where the model will run.
        dtype: in which 4-bit weights compute.
        of_checkpoint: the checkpoint's own quantization config, if it has one.

    Raises:
        StartupError: this device cannot do it, or the weights are quantized already.
    """
    if word == "none":
        return None
    if of_checkpoint is not None:
        raise StartupError(f"The weights are quantized already; use --quantization none instead of {word}.")
    if device.type == "mps":
        raise StartupError(f"--quantization {word} is not served on mps; use none, or --device cpu.")
    if device.type == "cpu":
        logger.warning("%s weights are smaller than bfloat16 ones on a CPU, but slower", word)
        # It says so at every layer of every step.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if word == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
