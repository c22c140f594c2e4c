"""Sequential baseline: `model.generate` for one request at a time, as KServe's transformers backend does.

The model has transformers' own layers, with the device and dtype that the predictor would choose. The rest is as in the
predictor: detokenizer, FastAPI on uvicorn, one event per token, torch's default threads. It supports what the benchmark
needs of OpenAI's completions: one greedy, streamed completion.
`python -m benchmarks.sequential --model_dir DIR --port PORT` listens on loopback when the model is loaded.
"""

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from transformers.generation.streamers import BaseStreamer

from predictor.generation.detokenizer import Detokenizer
from predictor.models import load_plan, placement

MODEL_NAME = "model"


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The supported part of OpenAI's request body."""

    prompt: str = Field(min_length=1)
    stream: Literal[True]
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=0, ge=0, le=0)
    ignore_eos: Literal[True]


class TokenStreamer(BaseStreamer):  # type: ignore[misc]
    """Emit new token ids as `generate` produces them; the first value is the prompt."""

    def __init__(self, emit: Callable[[list[int]], object]) -> None:
        self._emit = emit
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Emit the next ids; called in the thread of `generate`."""
        if self._has_prompt:
            self._emit(value.tolist())
        self._has_prompt = True

    def end(self) -> None:
        """Do nothing: there is no buffer to flush."""


class SequentialModel:
    """A model with one generation thread; requests wait in order."""

    def __init__(self, directory: Path, device: str, dtype: str) -> None:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        target = placement.choose_device(device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.context_tokens = int(config.max_position_embeddings)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=load_plan.choose_dtype(dtype, config.dtype, target),
            device_map={"": target},
            local_files_only=True,
        ).eval()
        self._model.generation_config.eos_token_id = None  # every completion has the requested length
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    async def generate(self, prompt: list[int], max_tokens: int) -> AsyncIterator[list[int]]:
        """Yield `max_tokens` new token ids as they are generated."""
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[list[int] | None] = asyncio.Queue()

        def emit(token_ids: list[int]) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, token_ids)

        done = loop.run_in_executor(self._thread, self._generate, prompt, max_tokens, emit)
        done.add_done_callback(lambda _: outputs.put_nowait(None))
        while (token_ids := await outputs.get()) is not None:
            yield token_ids
        await done

    def stop(self) -> None:
        """Cancel the waiting requests."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _generate(self, prompt: list[int], max_tokens: int, emit: Callable[[list[int]], None]) -> None:
        input_ids = torch.tensor([prompt], device=self._model.device)
        self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            streamer=TokenStreamer(emit),
        )


def make_app(model: SequentialModel) -> FastAPI:
    """Create the application with the two routes that the benchmark needs."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        model.stop()

    app = FastAPI(lifespan=lifespan)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL_NAME, "object": "model", "owned_by": "benchmark"}]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> StreamingResponse:
        prompt = model.tokenizer.encode(body.prompt, add_special_tokens=True)
        if len(prompt) + body.max_tokens > model.context_tokens:
            raise HTTPException(400, f"Prompt and completion together may have {model.context_tokens} tokens.")
        return StreamingResponse(_events(model, prompt, body), media_type="text/event-stream")

    return app


async def _events(model: SequentialModel, prompt: list[int], body: CompletionRequest) -> AsyncIterator[str]:
    """Yield one event per token, the usage if requested, and the end."""
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": MODEL_NAME,
    }
    detokenizer = Detokenizer(model.tokenizer)
    generated = 0
    async for token_ids in model.generate(prompt, body.max_tokens):
        generated += len(token_ids)
        is_last = generated == body.max_tokens
        text = detokenizer.push(token_ids, last=is_last)
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length" if is_last else None}
        yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n"
    if body.stream_options.include_usage:
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": generated,
            "total_tokens": len(prompt) + generated,
        }
        yield f"data: {json.dumps(head | {'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def main() -> None:
    """Load the model and serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sequential",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    arguments = parser.parse_args()
    model = SequentialModel(arguments.model_dir, arguments.device, arguments.dtype)
    uvicorn.run(make_app(model), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
