"""Stage `load`: the demo model in every mode, its warm-up, and the share of sums that it answers correctly."""

import argparse
import asyncio
import logging
import sys
import time
from typing import Any, get_args

import torch

from benchmarks.gpu_check import report
from demo import evaluate, exam
from devtools.paths import DEMO_MODEL
from predictor.engine.engine import Engine
from predictor.errors import StartupError
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.models.quantization import resolve_mode
from predictor.settings import Settings
from predictor.types import SamplingParams

logger = logging.getLogger(__name__)

LEAST_CORRECT = 0.97
"""As of `demo.evaluate`."""
PLACES = 32
WARM_UP_SECONDS = 60


def modes(device: str) -> dict[str, tuple[str, str]]:
    """Return dtype and quantization of each mode that the predictor has on a device, by name."""
    return {name: mode for name, mode in all_modes().items() if _is_supported(mode[1], torch.device(device))}


def _is_supported(quantization: str, device: torch.device) -> bool:
    try:
        return resolve_mode(quantization, device, None, 0, 0) == quantization
    except StartupError:
        return False


def all_modes() -> dict[str, tuple[str, str]]:
    """Return those of any device."""
    offered = get_args(Settings.model_fields["quantization"].annotation)
    quantized = {name: ("bfloat16", name) for name in offered if name not in ("auto", "none")}
    return {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), **quantized}


def measure(device: str, dtype: str, quantization: str, questions: int) -> dict[str, Any]:
    """Load the model, warm it up and grade its answers.

    Raises:
        ServerError: as of the loader and the engine.
    """
    before = allocated(device)
    began = time.perf_counter()
    loaded = loader.load(DEMO_MODEL, device=device, dtype=dtype, quantization=quantization)
    load_seconds = time.perf_counter() - began
    memory = allocated(device)
    settings = Settings(max_num_seqs=PLACES, max_queued_requests=questions, kv_cache_tokens=PLACES * 512)
    engine = Engine.from_model(
        loaded.model, settings, eos_token_ids=loaded.eos_token_ids, context_tokens=loaded.context_tokens
    )
    engine.start()
    try:
        began = time.perf_counter()
        asyncio.run(engine.warm_up(loaded.vocabulary_tokens, WARM_UP_SECONDS))
        warm_up_seconds = time.perf_counter() - began
        sums = exam.held_out_questions(questions, 0)
        answers = asyncio.run(_answer(engine, loaded, [question for question, _ in sums]))
    finally:
        engine.stop()
    return {
        "load_seconds": load_seconds,
        "warm_up_seconds": warm_up_seconds,
        "device_bytes": None if memory is None or before is None else memory - before,
        "correct": evaluate.accuracy(answers, [result for _, result in sums]),
    }


async def _answer(engine: Engine, loaded: LoadedModel, questions: list[str]) -> list[str]:
    sampling = SamplingParams(max_tokens=evaluate.MAX_TOKENS, temperature=0.0)
    prompts = []
    for question in questions:
        text = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(loaded.tokenizer.encode(text, add_special_tokens=False))
    streams = engine.submit([(prompt, sampling) for prompt in prompts])
    answers = []
    for stream in streams:
        token_ids = [token_id async for step in stream for token_id in step.token_ids]
        answers.append(loaded.tokenizer.decode(token_ids, skip_special_tokens=True))
    return answers


def allocated(device: str) -> int | None:
    """Return the bytes of all tensors on a GPU; None on a CPU, where torch does not count them."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else None


def main() -> int:
    """Measure every mode, save the figures and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.load_stage", description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--questions", type=int, required=True)
    arguments = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    for mode, (dtype, quantization) in modes(arguments.device).items():
        try:
            figures[mode] = measure(arguments.device, dtype, quantization, arguments.questions)
        except Exception as error:  # the other modes are measured too
            logger.exception("%s failed", mode)
            figures[mode] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        report.save({"modes": figures})
    return int(any(mode.get("correct", 0.0) < LEAST_CORRECT for mode in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
