"""Encode prompts without delaying the event loop: long texts, chats and grammars in threads, a few at a time.

Tokenizers release the interpreter lock while they encode. Chat templates do not, but Python switches between threads.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Generic, TypeVar

from predictor.errors import EngineStopped
from predictor.generation.prompts import EncodedRequest, Prompts
from predictor.types import Chat, GenerationRequest

NUM_THREADS = 4
NUM_THREADS_OF_A_CALLER = 3
"""The long prompts of one caller leave a thread to the others."""
MAX_INLINE_CHARS = 4096
"""Texts up to this size are encoded at once, within 1 ms; a thread would only add latency."""
LONG = MAX_INLINE_CHARS + 1

T = TypeVar("T")
Source = TypeVar("Source")


class Encoder(Generic[Source]):
    """Runs work of requests in the order of their arrival, a few of one caller at a time.

    Args:
        source: what the work encodes with.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="encode")
        self._closed = False
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(NUM_THREADS_OF_A_CALLER)
        )

    async def run(self, work: Callable[[Source], T], size: int, caller: str | None = None) -> T:
        """Return the result of `work`, in a thread if `size`, in characters or token ids, is more than a few KB.

        It can be cancelled until a thread begins.

        Args:
            work: of one request.
            size: of its texts.
            caller: name of the API key; None without keys.

        Raises:
            RequestError: as `work` does.
            EngineStopped: `close` was called.
        """
        if size <= MAX_INLINE_CHARS:
            return self._run(work)
        async with self._turns[caller] if caller else nullcontext():
            try:
                result = asyncio.get_running_loop().run_in_executor(self._threads, self._run, work)
            except RuntimeError:  # the threads have ended
                raise self._stopped() from None
            return await result

    def close(self) -> None:
        """Reject the requests that still wait, and end the threads."""
        self._closed = True
        self._threads.shutdown(wait=False)

    def _run(self, work: Callable[[Source], T]) -> T:
        if self._closed:
            raise self._stopped()
        return work(self._source)

    def _stopped(self) -> EngineStopped:
        return EngineStopped("The server stopped before the prompt was encoded. Retry later.")


class PromptEncoder(Encoder[Prompts]):
    """Encodes the prompts of generation requests."""

    async def encode(self, requests: Sequence[GenerationRequest], caller: str | None = None) -> list[EncodedRequest]:
        """Encode the requests of one client.

        Args:
            requests: at least one.
            caller: name of the API key; None without keys.

        Raises:
            RequestError: a request is invalid.
            EngineStopped: `close` was called.
        """
        return await self.run(
            lambda prompts: [prompts.encode(request) for request in requests], sum(map(_inline_size, requests)), caller
        )


def _inline_size(request: GenerationRequest) -> int:
    """Return the size of a request: of its prompt and of the words to encode; grammars may take long."""
    sampling = request.sampling
    if sampling.structured_output is not None:
        return LONG
    return prompt_size(request.prompt) + sum(map(len, sampling.bad_words))


def prompt_size(prompt: str | tuple[int, ...] | Chat) -> int:
    """Return the size of a prompt for `PromptEncoder.run`; LONG for chats, whose template may take long."""
    return LONG if isinstance(prompt, Chat) else len(prompt)
