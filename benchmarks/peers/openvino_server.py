"""OpenVINO GenAI's continuous batching behind OpenAI's completions; runs in that peer's environment.

One process makes the steps, another writes one event per token, as other servers do. It supports what the benchmark
needs: greedy, streamed completions of token ids, of an exact length.
`python -m benchmarks.peers.openvino_server --model_dir DIR --port PORT` listens on loopback when the model is loaded.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

MODEL_NAME = "model"
CACHE_GIB = 1


class Engine:
    """A continuous batching pipeline in a process of its own: its steps hold the interpreter's lock."""

    def __init__(self, model_dir: Path, max_num_seqs: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        context.Process(target=run_pipeline, args=(str(model_dir), max_num_seqs, other_end), daemon=True).start()
        other_end.close()
        self._outputs: dict[int, asyncio.Queue[list[int]]] = {}
        self._numbers = itertools.count()
        self._connection.recv()  # It has loaded the model.

    async def generate(self, prompt: list[int], max_tokens: int) -> AsyncIterator[list[int]]:
        """Yield new token ids as they are generated: `max_tokens`, or fewer if the pipeline has no room for them."""
        number = next(self._numbers)
        outputs = self._outputs[number] = asyncio.Queue()
        self._connection.send((number, prompt, max_tokens))
        while token_ids := await outputs.get():
            yield token_ids
        del self._outputs[number]

    def deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        """Pass the token ids of each step on to their requests in `loop`, until the process ends."""
        with suppress(EOFError):
            while True:
                loop.call_soon_threadsafe(self._put, self._connection.recv())

    def _put(self, step: list[tuple[int, list[int]]]) -> None:
        for number, token_ids in step:
            self._outputs[number].put_nowait(token_ids)


def run_pipeline(model_dir: str, max_num_seqs: int, connection: Connection) -> None:
    """Make steps while there are requests; send the new token ids of each, and none when a request has ended."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_seqs = max_num_seqs
    scheduler.enable_prefix_caching = False
    threads = {"INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model_dir, scheduler, "CPU", threads)
    connection.send(None)
    running: dict[int, Any] = {}
    with suppress(EOFError):
        while True:
            while not running or connection.poll():
                number, prompt, max_tokens = connection.recv()
                tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
                running[number] = pipeline.add_request(number, tokens, _greedy(max_tokens))
            pipeline.step()
            connection.send([part for number in list(running) for part in _read(running, number)])


def _greedy(max_tokens: int) -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = max_tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


def _read(running: dict[int, Any], number: int) -> Iterator[tuple[int, list[int]]]:
    """Yield a request's new token ids; after the last ones none, and remove it from `running`."""
    handle = running[number]
    # The status comes first: a request that has ended has no further outputs after these.
    has_ended = handle.get_status() != openvino_genai.GenerationStatus.RUNNING
    while handle.can_read():
        for output in handle.read().values():
            if output.generated_ids:
                yield number, list(output.generated_ids)
    if has_ended:
        del running[number]
        yield number, []


def make_app(engine: Engine, tokenizer: Tokenizer) -> Starlette:
    """Create the application with the two routes that the benchmark needs."""

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": MODEL_NAME, "object": "model"}]})

    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(
            _events(engine, tokenizer, body["prompt"], body["max_tokens"]), media_type="text/event-stream"
        )

    return Starlette(routes=[Route("/v1/models", models), Route("/v1/completions", completions, methods=["POST"])])


async def _events(engine: Engine, tokenizer: Tokenizer, prompt: list[int], max_tokens: int) -> AsyncIterator[str]:
    """Yield one event per step, the usage, and the end."""
    head = {"id": "completion", "object": "text_completion", "model": MODEL_NAME}
    generated = 0
    async for token_ids in engine.generate(prompt, max_tokens):
        generated += len(token_ids)
        choice = {"index": 0, "text": tokenizer.decode(token_ids), "logprobs": None, "finish_reason": None}
        yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n"
    usage = {"prompt_tokens": len(prompt), "completion_tokens": generated, "total_tokens": len(prompt) + generated}
    yield f"data: {json.dumps(head | {'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def main() -> None:
    """Load the model and serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max_num_seqs", type=int, default=32)
    arguments = parser.parse_args()
    engine = Engine(arguments.model_dir, arguments.max_num_seqs)
    app = make_app(engine, Tokenizer.from_file(str(arguments.model_dir / "tokenizer.json")))

    async def serve() -> None:
        threading.Thread(target=engine.deliver, args=(asyncio.get_running_loop(),), daemon=True).start()
        config = uvicorn.Config(app, host="127.0.0.1", port=arguments.port, log_level="warning")
        await uvicorn.Server(config).serve()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
