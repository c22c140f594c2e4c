"""Where and in which order prompts are encoded; the encoding itself waits for the test."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from predictor.errors import EngineStopped, InvalidRequest
from predictor.generation.prompt_encoder import (
    MAX_INLINE_CHARS,
    NUM_THREADS,
    NUM_THREADS_OF_A_CALLER,
    PromptEncoder,
)
from predictor.generation.prompts import EncodedRequest, Prompts
from predictor.types import Chat, GenerationRequest, SamplingParams
from tests.predictor.servers import HANG_SECONDS

SHORT, LONG = GenerationRequest("a"), GenerationRequest("a" * (MAX_INLINE_CHARS + 1))
CHAT = GenerationRequest(Chat(({"role": "user", "content": "a"},)))
LONG_WORDS = GenerationRequest("a", SamplingParams(bad_words=("a" * MAX_INLINE_CHARS, "b")))


class HeldPrompts:
    """Encodes once `opened` is set, and records the threads."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.threads: list[threading.Thread] = []
        self._started = threading.Semaphore(0)

    def encode(self, request: GenerationRequest) -> EncodedRequest:
        self.threads.append(threading.current_thread())
        self._started.release()
        if request is not SHORT:
            assert self.opened.wait(60)
        return EncodedRequest([1], SamplingParams(), 1, "")

    async def wait_until_started(self, requests: int = 1) -> None:
        for _ in range(requests):
            assert await asyncio.to_thread(self._started.acquire, timeout=HANG_SECONDS)


@pytest.fixture
def held() -> Iterator[HeldPrompts]:
    held = HeldPrompts()
    yield held
    held.opened.set()


@pytest.fixture
def encoder(held: HeldPrompts) -> Iterator[PromptEncoder]:
    encoder = PromptEncoder(cast(Any, held))
    yield encoder
    held.opened.set()
    encoder.close()


async def started(encoder: PromptEncoder, held: HeldPrompts, requests: list[GenerationRequest]) -> list[Any]:
    """Encode each request in a task, and wait until all threads are busy."""
    tasks = [asyncio.create_task(encoder.encode([request])) for request in requests]
    await held.wait_until_started(min(NUM_THREADS, len(tasks)))
    return tasks


def test_encode_long_prompts_of_one_caller_leave_a_thread_to_others(encoder: PromptEncoder, held: HeldPrompts) -> None:
    async def encode() -> None:
        tasks = [asyncio.create_task(encoder.encode([LONG], "greedy")) for _ in range(NUM_THREADS + 2)]
        await held.wait_until_started(NUM_THREADS_OF_A_CALLER)
        tasks.append(asyncio.create_task(encoder.encode([LONG], "modest")))
        await held.wait_until_started()
        assert len(held.threads) == NUM_THREADS_OF_A_CALLER + 1
        held.opened.set()
        await asyncio.gather(*tasks)
        assert len(held.threads) == NUM_THREADS + 3

    asyncio.run(encode())


def test_encode_short_text_needs_no_thread(encoder: PromptEncoder, held: HeldPrompts) -> None:
    assert len(asyncio.run(encoder.encode([SHORT, SHORT]))) == 2
    assert held.threads == [threading.main_thread()] * 2


@pytest.mark.parametrize(
    "requests",
    [[LONG], [CHAT], [SHORT, CHAT], [GenerationRequest((1,) * 3000)] * 2, [LONG_WORDS]],
    ids=["long", "chat", "chat-and-text", "several", "words"],
)
def test_encode_long_text_or_chat_leaves_the_event_loop_free(
    encoder: PromptEncoder, held: HeldPrompts, requests: list[GenerationRequest]
) -> None:
    async def encode() -> list[EncodedRequest]:
        encoding = asyncio.create_task(encoder.encode(requests))
        await held.wait_until_started()
        await encoder.encode([SHORT])
        assert not encoding.done()
        held.opened.set()
        return await encoding

    assert len(asyncio.run(encode())) == len(requests)
    assert threading.main_thread() in held.threads
    assert held.threads[0] is not threading.main_thread()


def test_encode_cancelled_while_it_waits_is_not_encoded(encoder: PromptEncoder, held: HeldPrompts) -> None:
    async def encode() -> None:
        *running, waiting = await started(encoder, held, [CHAT] * (NUM_THREADS + 1))
        waiting.cancel()
        await asyncio.wait([waiting])
        held.opened.set()
        await asyncio.gather(*running)
        await encoder.encode([LONG])

    asyncio.run(encode())
    assert len(held.threads) == NUM_THREADS + 1


def test_close_rejects_requests_that_wait_and_new_ones(encoder: PromptEncoder, held: HeldPrompts) -> None:
    async def encode() -> None:
        *running, waiting = await started(encoder, held, [CHAT] * (NUM_THREADS + 1))
        encoder.close()
        held.opened.set()
        await asyncio.gather(*running)
        for encoding in (waiting, encoder.encode([CHAT]), encoder.encode([SHORT])):
            with pytest.raises(EngineStopped, match="stopped before the prompt was encoded"):
                await encoding

    asyncio.run(encode())


def test_encode_one_invalid_prompt_of_several_raises(prompts: Prompts) -> None:
    encoder = PromptEncoder(prompts)
    with pytest.raises(InvalidRequest):
        asyncio.run(encoder.encode([GenerationRequest("1"), GenerationRequest("")]))
    encoder.close()
