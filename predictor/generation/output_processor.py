"""Steps of token ids become pieces of text: stop strings, log probabilities, several sequences as one answer.

Between the engine, which knows no text, and the protocols, which know no sequences.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from predictor.engine.engine import Engine, Stream
from predictor.errors import DeadlineExceeded, GenerationFailed
from predictor.generation.detokenizer import Detokenizer
from predictor.generation.logprobs import LogprobsFormatter
from predictor.generation.prompts import Prompts
from predictor.types import (
    CANCELLED,
    DEADLINE,
    FAILED,
    Completion,
    CompletionDelta,
    FinishedSequence,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Token,
)


class Answer:
    """The completions of one request of a client, being made. Read `pieces` or `complete`, once; `close` always."""

    def __init__(self, sequences: Sequence["_Sequence"]) -> None:
        self._sequences = sequences

    async def pieces(self) -> AsyncGenerator[CompletionDelta]:
        """All sequences' pieces as they come; the first failure ends them all.

        Raises:
            RequestError: the engine failed, or the time is over.
        """
        news: asyncio.Queue[CompletionDelta | Exception] = asyncio.Queue()

        async def read(sequence: _Sequence) -> None:
            try:
                async for piece in sequence.pieces():
                    news.put_nowait(piece)
            except Exception as error:  # noqa: BLE001, whoever reads the pieces raises it
                news.put_nowait(error)

        tasks = [asyncio.create_task(read(sequence)) for sequence in self._sequences]
        unfinished = len(tasks)
        try:
            while unfinished:
                piece = await news.get()
                if isinstance(piece, Exception):
                    for sequence in self._sequences:
                        sequence.fail(piece)
                    raise piece
                unfinished -= piece.finish_reason is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    async def complete(self) -> list[Completion]:
        """All completions, in order.

        Raises:
            RequestError: the engine failed; or the time is over, with the text so far.
        """
        said: list[list[CompletionDelta]] = [[] for _ in self._sequences]
        try:
            async for piece in self.pieces():
                said[piece.index].append(piece)
        except DeadlineExceeded as error:
            texts = ("".join(piece.text for piece in pieces) for pieces in said)
            raise DeadlineExceeded(str(error), tuple(texts)) from error
        return [_joined(pieces) for pieces in said]

    def close(self) -> None:
        """Free the places of all sequences that have not ended. Harmless when they have."""
        for sequence in self._sequences:
            sequence.close()


def begin(
    requests: Sequence[GenerationRequest],
    prompts: Prompts,
    engine: Engine,
    deadline: float,
    on_end: Callable[[FinishedSequence], None],
    on_tokens: Callable[[int, float | None], None],
) -> Answer:
    """Begin to answer requests, `n` sequences for each; all of them or none.

    Args:
        requests: at least one.
        prompts: of the model.
        engine: started.
        deadline: by `time.monotonic()`.
        on_end: told of each sequence, once, when it has ended in whatever way.
        on_tokens: told how many tokens a sequence has made, and how many seconds after those before; None: the first.

    Raises:
        RequestError: a request is wrong, or there is no room.
    """
    names = LogprobsFormatter(prompts.tokenizer)
    prepared: list[tuple[list[int], SamplingParams, str]] = []
    for request in requests:
        ids, sampling = prompts.encode(request)
        echo = prompts.text(request) if request.echo else ""
        seed = sampling.seed
        prepared += [
            (ids, sampling if seed is None else replace(sampling, seed=seed + copy), echo) for copy in range(request.n)
        ]
    streams = engine.submit([(ids, sampling) for ids, sampling, _ in prepared], deadline)
    return Answer(
        [
            _Sequence(
                index,
                stream,
                Detokenizer(prompts.tokenizer, sampling.stop, sampling.min_tokens),
                names,
                len(ids),
                echo,
                on_end,
                on_tokens,
            )
            for index, (stream, (ids, sampling, echo)) in enumerate(zip(streams, prepared, strict=True))
        ]
    )


class _Sequence:
    """One completion in the making."""

    def __init__(
        self,
        index: int,
        stream: Stream,
        detokenizer: Detokenizer,
        names: LogprobsFormatter,
        prompt_tokens: int,
        echo: str,
        on_end: Callable[[FinishedSequence], None],
        on_tokens: Callable[[int, float | None], None],
    ) -> None:
        self._index = index
        self._stream = stream
        self._detokenizer = detokenizer
        self._names = names
        self._prompt_tokens = prompt_tokens
        self._echo = echo
        self._on_end: Callable[[FinishedSequence], None] | None = on_end
        self._on_tokens = on_tokens
        self._last_step: float | None = None
        self._generated = 0
        self._outcome = CANCELLED

    async def pieces(self) -> AsyncGenerator[CompletionDelta]:
        """The pieces, up to the one with a finish reason."""
        index = self._index
        if self._echo:
            yield CompletionDelta(index, self._echo, self._prompt_tokens, 0)
        try:
            async for step in self._stream:
                text, tokens, finish_reason = "", [], step.finish_reason
                self._count(len(step.token_ids))
                for position, token_id in enumerate(step.token_ids):
                    last = finish_reason is not None and position == len(step.token_ids) - 1
                    self._generated += 1
                    tokens += [self._names.name(chosen) for chosen in step.logprobs[position : position + 1]]
                    silent = last and finish_reason is not FinishReason.LENGTH
                    text += self._detokenizer.push([] if silent else [token_id], last=last)
                    if self._detokenizer.stopped:
                        finish_reason = FinishReason.STOP_SEQUENCE
                        break
                if finish_reason is not None:
                    self._outcome = finish_reason.value
                    self.close()
                yield CompletionDelta(index, text, self._prompt_tokens, self._generated, finish_reason, tuple(tokens))
                if finish_reason is not None:
                    return
        except Exception as error:
            self.fail(error)
            raise
        raise GenerationFailed("The engine ended without saying why; the server's log says more.")

    def _count(self, tokens: int) -> None:
        if tokens:
            now = time.monotonic()
            self._on_tokens(tokens, None if self._last_step is None else now - self._last_step)
            self._last_step = now

    def fail(self, error: Exception) -> None:
        """What ends this one, or the whole answer, is no leaving of the client."""
        self._outcome = DEADLINE if isinstance(error, DeadlineExceeded) else FAILED

    def close(self) -> None:
        self._stream.close()
        if self._on_end:
            stream = self._stream
            self._on_end(
                FinishedSequence(
                    self._index,
                    self._outcome,
                    self._prompt_tokens,
                    self._generated,
                    stream.submitted,
                    time.monotonic() - stream.submitted,
                    stream.queue_seconds,
                    stream.first_token_seconds,
                )
            )
            self._on_end = None


def _joined(pieces: Sequence[CompletionDelta]) -> Completion:
    last = pieces[-1]
    if last.finish_reason is None:
        raise GenerationFailed("The engine ended without saying why; the server's log says more.")
    tokens: tuple[Token, ...] = tuple(token for piece in pieces for token in piece.tokens)
    text = "".join(piece.text for piece in pieces)
    return Completion(text, last.finish_reason, last.prompt_tokens, last.completion_tokens, tokens)
