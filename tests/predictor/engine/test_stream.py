"""Streams on an executor without a model."""

import asyncio
from collections.abc import Callable, Collection, Sequence

import pytest
import torch

from predictor.engine import stream as stream_module
from predictor.engine.engine import Engine
from predictor.engine.executor import EngineOutput, Executor
from predictor.engine.sampler import SequenceSampler
from predictor.engine.speculation import Speculation
from predictor.engine.stream import Stream
from predictor.errors import EngineStopped, GenerationFailed, RequestError
from predictor.types import Caller, FinishReason, SamplingParams, Step


class FakeExecutor:
    """Executor whose outputs come from the test."""

    def __init__(self) -> None:
        self.cache_tokens = 1024
        self.cache_usage = 0.0
        self.num_running = 0
        self.step_count = 0
        self.failed_step_count = 0
        self.speculation = Speculation(max_rows=1)
        self.is_running = True
        self.is_accepting = True
        self.has_pending = False
        self.cancelled: list[str] = []
        self.output: Callable[[EngineOutput], None] = lambda _: None

    def start(self) -> None:
        pass

    def stop(self, timeout_seconds: float) -> None:
        self.is_running = self.is_accepting = timeout_seconds < 0

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampler: SequenceSampler,
        *,
        max_tokens: int | None,
        end_token_ids: Collection[int],
        on_output: Callable[[EngineOutput], None],
        caller: Caller | None = None,
        priority: int = 0,
    ) -> None:
        del request_id, prompt, sampler, max_tokens, end_token_ids, caller, priority
        self.output = on_output

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def queue_seconds(self, request_id: str) -> float | None:
        return 0.5 if request_id else None

    def plain_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.zeros(len(token_ids), 1)

    def end_plain_passes(self) -> None:
        pass

    def follow(self) -> None:
        pass


def output(*token_ids: int, finished: bool = False, error: str | None = None) -> EngineOutput:
    return EngineOutput(list(token_ids), finished, error, queue_seconds=0.25)


def submit(executor: FakeExecutor, sampling: SamplingParams | None = None) -> tuple[Engine, Stream]:
    implementation: Executor = executor
    engine = Engine(implementation, eos_token_ids=frozenset({2}), context_tokens=1024, capacity=2)
    [stream] = engine.submit([([1], sampling or SamplingParams())])
    return engine, stream


def test_stream_cumulative_outputs_become_steps_of_new_tokens() -> None:
    async def read() -> list[Step]:
        executor = FakeExecutor()
        engine, stream = submit(executor)
        executor.output(output(5))
        steps = [await anext(stream)]
        executor.output(output(5, 6))
        executor.output(output(5, 6, 2, finished=True))
        steps += [step async for step in stream]
        assert (engine.waiting, stream.queue_seconds, executor.cancelled) == (0, 0.25, [])
        return steps

    assert asyncio.run(read()) == [Step([5]), Step([6, 2], FinishReason.EOS_TOKEN)]


@pytest.mark.parametrize("alive", [True, False], ids=["alive", "dead"])
def test_stream_output_with_an_error_fails_the_sequence(alive: bool) -> None:
    async def fail() -> RequestError:
        executor = FakeExecutor()
        engine, stream = submit(executor)
        executor.is_accepting = alive
        executor.output(output(error="no memory", finished=True))
        with pytest.raises(RequestError) as raised:
            await anext(stream)
        assert (engine.waiting, len(executor.cancelled)) == (0, 1)
        return raised.value

    assert isinstance(asyncio.run(fail()), GenerationFailed if alive else EngineStopped)


def test_stream_dead_step_loop_without_output_fails_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "LIVENESS_POLL_SECONDS", 0.01)

    async def fail() -> None:
        executor = FakeExecutor()
        engine, stream = submit(executor)
        waiting = asyncio.create_task(stream.__anext__())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        executor.is_accepting = False
        with pytest.raises(EngineStopped, match="before the completion finished"):
            await waiting
        assert engine.waiting == 0

    asyncio.run(asyncio.wait_for(fail(), 60))


def test_stream_without_new_tokens_ends_without_the_executor() -> None:
    async def read() -> None:
        executor = FakeExecutor()
        engine, stream = submit(executor, SamplingParams(max_tokens=0))
        assert [step async for step in stream] == [Step([], FinishReason.LENGTH)]
        assert (stream.first_token_seconds, stream.queue_seconds, engine.waiting) == (None, None, 0)
        engine, stream = submit(executor, SamplingParams(max_tokens=0))
        stream.close()
        assert (executor.cancelled, engine.waiting) == ([], 0)

    asyncio.run(read())


def test_stream_close_cancels_once_and_records_queue_time() -> None:
    async def close() -> None:
        executor = FakeExecutor()
        engine, stream = submit(executor)
        stream.close()
        stream.close()
        assert (len(executor.cancelled), stream.queue_seconds, engine.waiting) == (1, 0.5, 0)

    asyncio.run(close())
