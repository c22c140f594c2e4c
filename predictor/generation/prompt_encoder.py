"""Encode prompts without delaying the event loop: long texts, chats and grammars in threads, a few at a time.

Tokenizers release the interpreter lock while they encode. Chat templates do not, but Python switches between threads.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from predictor.errors import EngineStopped
from predictor.generation.prompts import EncodedRequest, Prompts
from predictor.types import Chat, GenerationRequest

NUM_THREADS = 4
NUM_THREADS_OF_A_CALLER = 3
"""The long prompts of one caller leave a thread to the others."""
MAX_INLINE_CHARS = 4096
"""Texts up to this size are encoded at once, within 1 ms; a thread would only add latency."""


class PromptEncoder:
    """Encodes requests in the order of their arrival, a few of one caller at a time.

    Args:
        prompts: of the model.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="encode")
        self._closed = False
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(NUM_THREADS_OF_A_CALLER)
        )

    async def encode(self, requests: Sequence[GenerationRequest], caller: str | None = None) -> list[EncodedRequest]:
        """Encode the requests of one client; it can be cancelled until a thread begins.

        Args:
            requests: at least one.
            caller: name of the API key; None without keys.

        Raises:
            RequestError: a request is invalid.
            EngineStopped: `close` was called.
        """
        if sum(map(_inline_size, requests)) <= MAX_INLINE_CHARS:
            return self._encode(requests)
        async with self._turns[caller] if caller else nullcontext():
            return await self._encode_in_thread(requests)

    async def _encode_in_thread(self, requests: Sequence[GenerationRequest]) -> list[EncodedRequest]:
        try:
            encoded = asyncio.get_running_loop().run_in_executor(self._threads, self._encode, requests)
        except RuntimeError:  # the threads have ended
            raise self._stopped() from None
        return await encoded

    def close(self) -> None:
        """Reject the requests that still wait, and end the threads."""
        self._closed = True
        self._threads.shutdown(wait=False)

    def _encode(self, requests: Sequence[GenerationRequest]) -> list[EncodedRequest]:
        if self._closed:
            raise self._stopped()
        return [self._prompts.encode(request) for request in requests]

    def _stopped(self) -> EngineStopped:
        return EngineStopped("The server stopped before the prompt was encoded. Retry later.")


def _inline_size(request: GenerationRequest) -> int:
    """Return the size of a prompt, in characters or token ids; chat templates and grammars may take long."""
    if isinstance(request.prompt, Chat) or request.sampling.structured_output is not None:
        return MAX_INLINE_CHARS + 1
    return len(request.prompt)
