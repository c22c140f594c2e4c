"""Measure prompt lookup at one caller: `python -m benchmarks.speculation --model_dir DIR`.

A model with random weights copies nothing, so the answers are given: a mask of each sequence allows only the next token
of its text, as a grammar does. What is guessed, verified and accepted is then decided by real texts, and all else is
computed as for any answer. Texts are made from the standard library: code with a name changed, the first sentences of a
document, quotations from another one, and random tokens. A token is a space and up to six letters, another
character or a run of white space, about as in the vocabularies of language models.

Both engines are in this process, on one model, and take turns. The time is that from the first token to the last.
"""

import argparse
import asyncio
import heapq
import inspect
import random
import re
import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from predictor.engine.engine import Engine
from predictor.models import loader
from predictor.models.loader import LoadedModel
from predictor.settings import Settings
from predictor.types import SamplingParams

MODES = ("none", "prompt_lookup")
_TOKEN = re.compile(r" ?\w{1,6}|\s+|[^\w\s]")
_FIRST_ID = 10


def texts() -> dict[str, tuple[str, str]]:
    """Return prompts and answers, by task."""
    code = inspect.getsource(textwrap.TextWrapper._wrap_chunks)  # noqa: SLF001
    document = heapq.__about__
    sentences = [paragraph.split(". ")[0].strip() for paragraph in document.split("\n\n")]
    options = inspect.getdoc(textwrap.TextWrapper) or ""
    quotes = re.findall(r"^  (\w+) \(default: (\w+)\)\n((?:    .*\n)+)", options, re.MULTILINE)
    return {
        "edited code": (f"Rename cur_line to parts:\n{code}\nThe result:\n", code.replace("cur_line", "parts")),
        "summary": (f"Summarize:\n{document}\nSummary:\n", ". In short, ".join(filter(None, sentences))),
        "quotations": (
            f"{options}\nWhich options are on by default?\n",
            " And then: ".join(f"`{name}`, {text.strip()}" for name, default, text in quotes if default == "true"),
        ),
    }


class Vocabulary:
    """Token ids of the tokens of texts, in the order in which they occur first."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """Return token ids."""
        return [self._ids.setdefault(token, _FIRST_ID + len(self._ids)) for token in _TOKEN.findall(text)]


class Replay:
    """Token mask that allows only the next token of a text."""

    def __init__(self, token_ids: Sequence[int], vocabulary_tokens: int) -> None:
        self._token_ids = token_ids
        self._octets = np.zeros(-(-vocabulary_tokens // 8), dtype=np.uint8)

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> NDArray[np.uint8]:
        """Return the bits, as of `TokenMask`."""
        del prompt_ids
        self._octets[:] = 0
        token_id = self._token_ids[len(output_ids)]
        self._octets[token_id // 8] = 1 << token_id % 8
        return self._octets


@contextmanager
def started(loaded: LoadedModel, mode: str) -> Iterator[Engine]:
    """Run an engine."""
    settings = Settings(speculation=mode, kv_cache_tokens=8192, max_num_batched_tokens=2048)
    engine = Engine.from_model(
        loaded.model, settings, eos_token_ids=loaded.eos_token_ids, context_tokens=loaded.context_tokens
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def decode_seconds(engine: Engine, prompt: list[int], answer: list[int], vocabulary_tokens: int) -> float:
    """Return the time from the first token of an answer to the last one."""
    sampling = SamplingParams(
        max_tokens=len(answer),
        temperature=0.0,
        ignore_eos=True,
        token_masks=(lambda: Replay(answer, vocabulary_tokens),),
    )
    [stream] = engine.submit([(prompt, sampling)])
    token_ids: list[int] = []
    times = []
    async for step in stream:
        token_ids += step.token_ids
        times.append(time.perf_counter())
    if token_ids != answer:
        raise SystemExit("error: the answer is not its text, so the figures mean nothing")
    return times[-1] - times[0]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="a directory of `benchmarks.make_model`")
    parser.add_argument("--max_tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each kind (default: %(default)s)")
    arguments = parser.parse_args()
    loaded = loader.load(arguments.model_dir, device="cpu", dtype="auto", trust_remote_code=False, quantization="8bit")
    vocabulary = Vocabulary()
    tasks = {name: tuple(map(vocabulary.encode, pair)) for name, pair in texts().items()}
    rng = random.Random(1)
    tasks["random tokens"] = tuple(rng.choices(range(_FIRST_ID, loaded.vocabulary_tokens), k=300) for _ in range(2))
    print(f"{'task':<14} {'tokens':>6} {'none, ms/token':>15} {'lookup':>7} {'ratio':>6} {'accepted/guessed':>17}")
    with started(loaded, MODES[0]) as plain, started(loaded, MODES[1]) as speculative:
        engines = [plain, speculative]
        for name, (prompt, whole_answer) in tasks.items():
            answer = whole_answer[: arguments.max_tokens]
            counts = speculative.speculation.num_accepted_tokens, speculative.speculation.num_draft_tokens
            seconds: dict[Engine, list[float]] = {engine: [] for engine in engines}
            for repetition in range(arguments.repetitions):
                for engine in engines[:: 1 if repetition % 2 else -1]:
                    seconds[engine].append(
                        asyncio.run(decode_seconds(engine, prompt, answer, loaded.vocabulary_tokens))
                    )
            none, lookup = (1000 * statistics.median(seconds[engine]) / (len(answer) - 1) for engine in engines)
            ratio = statistics.median(a / b for a, b in zip(seconds[plain], seconds[speculative], strict=True))
            accepted = speculative.speculation.num_accepted_tokens - counts[0]
            guessed = speculative.speculation.num_draft_tokens - counts[1]
            print(
                f"{name:<14} {len(answer):>6} {none:>15.1f} {lookup:>7.1f} {ratio:>6.2f} {f'{accepted}/{guessed}':>17}"
            )


if __name__ == "__main__":
    main()
