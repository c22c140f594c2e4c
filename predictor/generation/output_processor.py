"""Turn the engine's steps of token ids into completions: detokenization, stop strings, log probabilities.

The engine handles token ids only, and the protocols handle completions only; this module connects them.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from predictor.engine.engine import Engine
from predictor.engine.stream import Stream
from predictor.errors import DeadlineExceeded, GenerationFailed
from predictor.generation.detokenizer import Detokenizer, left_context
from predictor.generation.logprobs import LogprobsFormatter, format_prompt
from predictor.generation.output_parser import OutputParser
from predictor.generation.prompts import EncodedRequest
from predictor.generation.tokenizer import Tokenizer
from predictor.types import (
    CANCELLED,
    DEADLINE,
    FAILED,
    Caller,
    Completion,
    CompletionDelta,
    FinishedSequence,
    FinishReason,
    OutputDelta,
    ReasoningDelta,
    Step,
    TextDelta,
    Token,
    ToolCall,
    ToolCallDelta,
)

OnFinished = Callable[[FinishedSequence], None]
"""Called once for each sequence when it has ended, whatever the outcome."""
OnTokens = Callable[[int, float | None], None]
"""Called with the number of new tokens of a sequence and the seconds since its previous ones; None for its first."""


class CompletionStream:
    """The completions of one client request. Read `deltas` or `complete` once, and always call `close`."""

    def __init__(self, sequences: Sequence["_Sequence"]) -> None:
        self._sequences = sequences

    async def deltas(self) -> AsyncGenerator[CompletionDelta]:
        """Yield the deltas of all sequences as they are generated; the first failure ends them all.

        Raises:
            RequestError: the engine failed, or the request timed out.
        """
        queue: asyncio.Queue[CompletionDelta | Exception] = asyncio.Queue()

        async def read(sequence: _Sequence) -> None:
            try:
                async for delta in sequence.deltas():
                    queue.put_nowait(delta)
            except Exception as error:  # noqa: BLE001, raised below
                queue.put_nowait(error)

        tasks = [asyncio.create_task(read(sequence)) for sequence in self._sequences]
        unfinished = len(tasks)
        try:
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    for sequence in self._sequences:
                        sequence.fail(item)
                    raise item
                if item.finish_reason is not None:
                    unfinished -= 1
                yield item
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    async def complete(self) -> list[Completion]:
        """Return all completions, in order.

        Raises:
            RequestError: the engine failed; or the request timed out, with the text generated so far.
        """
        received: list[list[CompletionDelta]] = [[] for _ in self._sequences]
        completions: dict[int, Completion] = {}
        try:
            async for delta in self.deltas():
                deltas = received[delta.index]
                deltas.append(delta)
                if delta.finish_reason is not None:
                    completions[delta.index] = _completion(deltas)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(str(error), tuple(map(_text, received))) from error
        return [completions[index] for index in range(len(self._sequences))]

    def close(self) -> None:
        """Cancel all sequences that have not finished; safe to call again."""
        for sequence in self._sequences:
            sequence.close()


def submit(
    requests: Sequence[EncodedRequest],
    *,
    tokenizer: Tokenizer,
    engine: Engine,
    deadline: float,
    on_finished: OnFinished,
    on_tokens: OnTokens,
    caller: Caller | None = None,
) -> CompletionStream:
    """Submit at least one request to the engine, `n` sequences for each; all of them or none.

    The deadline is by `time.monotonic()`. The caller is None without API keys.

    Raises:
        RequestError: there are too many sequences, or the queue is full.
    """
    prepared = []
    for request in requests:
        token_ids, sampling, echo = request.token_ids, request.sampling, request.echo
        context = left_context(tokenizer, token_ids)
        for copy in range(request.n):
            seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + copy)
            parser = request.output_parser() if request.output_parser else None
            prepared.append((token_ids, seeded, context, echo, parser))
    streams = engine.submit([(token_ids, sampling) for token_ids, sampling, *_ in prepared], deadline, caller)
    return CompletionStream(
        [
            _Sequence(
                index=index,
                stream=stream,
                tokenizer=tokenizer,
                detokenizer=Detokenizer(
                    tokenizer,
                    context,
                    stop=sampling.stop,
                    min_tokens=sampling.min_tokens,
                    special_tokens=parser.special_tokens if parser else {},
                ),
                logprobs=LogprobsFormatter(tokenizer, context),
                prompt_tokens=len(token_ids),
                echo=echo,
                scores_prompt=sampling.prompt_logprobs is not None,
                parser=parser,
                on_finished=on_finished,
                on_tokens=on_tokens,
            )
            for index, (stream, (token_ids, sampling, context, echo, parser)) in enumerate(
                zip(streams, prepared, strict=True)
            )
        ]
    )


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """One completion while it is generated."""

    index: int
    stream: Stream
    tokenizer: Tokenizer
    detokenizer: Detokenizer
    logprobs: LogprobsFormatter
    prompt_tokens: int
    echo: str
    scores_prompt: bool
    parser: OutputParser | None
    on_finished: OnFinished
    on_tokens: OnTokens
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    outcome: str = CANCELLED
    last_step_at: float | None = None
    closed: bool = False

    async def deltas(self) -> AsyncGenerator[CompletionDelta]:
        """Yield deltas up to the one with a finish reason."""
        if self.echo and not self.scores_prompt:
            yield self._completion_delta(self._echo())
        try:
            async for step in self.stream:
                if step.prompt_logprobs:
                    prompt = await format_prompt(self.tokenizer, step.prompt_logprobs)
                    yield replace(self._completion_delta(self._echo()), prompt=prompt)
                delta = self._process(step)
                if delta.finish_reason is not None:
                    self.outcome = delta.finish_reason.value
                    self.close()
                yield delta
                if delta.finish_reason is not None:
                    return
        except Exception as error:
            self.fail(error)
            raise
        raise GenerationFailed("Generation ended without a finish reason. See the server log.")

    def fail(self, error: Exception) -> None:
        """Record the outcome of a sequence that `error` ends, whether its own or another sequence's."""
        self.outcome = DEADLINE if isinstance(error, DeadlineExceeded) else FAILED

    def close(self) -> None:
        """Release the sequence's place in the engine and report its end, once."""
        stream = self.stream
        stream.close()
        if self.closed:
            return
        self.closed = True
        self.on_finished(
            FinishedSequence(
                index=self.index,
                outcome=self.outcome,
                prompt_tokens=self.prompt_tokens,
                completion_tokens=self.completion_tokens,
                admitted_at=stream.submitted,
                total_seconds=time.monotonic() - stream.submitted,
                queue_seconds=stream.queue_seconds,
                first_token_seconds=stream.first_token_seconds,
            )
        )

    def _echo(self) -> list[OutputDelta]:
        return [TextDelta(self.echo)] if self.echo else []

    def _process(self, step: Step) -> CompletionDelta:
        """Count the tokens of a step, and detokenize it up to the first stop string."""
        before = self.completion_tokens
        deltas: list[OutputDelta] = []
        tokens, finish_reason = [], step.finish_reason
        # The token that ends a completion is not part of its text.
        drop_last = finish_reason not in (None, FinishReason.LENGTH)
        for position, token_id in enumerate(step.token_ids, start=1):
            self.completion_tokens += 1
            if step.logprobs:
                tokens.append(self.logprobs.format(step.logprobs[position - 1]))
            last = finish_reason is not None and position == len(step.token_ids)
            token_ids = [] if last and drop_last else [token_id]
            deltas += self._parse(self.detokenizer.push(token_ids, last=last), len(token_ids))
            if self.detokenizer.found_stop is not None or (self.parser and self.parser.stopped):
                finish_reason = FinishReason.STOP_SEQUENCE
                break
        self._count(self.completion_tokens - before)
        if finish_reason is not None and self.parser is not None:
            deltas += self.parser.finish()
            self.reasoning_tokens = self.parser.reasoning_tokens
            if self.parser.has_tool_calls and finish_reason is not FinishReason.LENGTH:
                finish_reason = FinishReason.TOOL_CALLS
        return self._completion_delta(_joined(deltas), finish_reason, tokens)

    def _count(self, tokens: int) -> None:
        """Report the tokens of a step that belong to the completion: a step may have more, after a stop string."""
        if not tokens:
            return
        now = time.monotonic()
        self.on_tokens(tokens, None if self.last_step_at is None else now - self.last_step_at)
        self.last_step_at = now

    def _parse(self, text: str, num_tokens: int) -> list[OutputDelta]:
        if self.parser is None:
            return [TextDelta(text)] if text else []
        deltas = self.parser.feed(text, num_tokens=num_tokens)
        self.reasoning_tokens = self.parser.reasoning_tokens
        return deltas

    def _completion_delta(
        self, deltas: Sequence[OutputDelta], finish_reason: FinishReason | None = None, tokens: Sequence[Token] = ()
    ) -> CompletionDelta:
        return CompletionDelta(
            index=self.index,
            deltas=tuple(deltas),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            reasoning_tokens=self.reasoning_tokens,
            stop=self.detokenizer.found_stop,
            finish_reason=finish_reason,
            tokens=tuple(tokens),
        )


def _text(deltas: Sequence[CompletionDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def _joined(deltas: Iterable[OutputDelta]) -> list[OutputDelta]:
    """Return the deltas, consecutive ones of the same text, reasoning or arguments as one."""
    return [_join(list(run)) for _, run in groupby(deltas, _continuity)]


def _continuity(delta: OutputDelta) -> object:
    """Return a key that consecutive deltas share if they are one text, one reasoning or fragments of one call."""
    return (delta.index, delta.id) if isinstance(delta, ToolCallDelta) else type(delta)


def _join(run: Sequence[OutputDelta]) -> OutputDelta:
    first = run[0]
    if isinstance(first, ToolCallDelta):
        return replace(first, arguments="".join(delta.arguments for delta in run if isinstance(delta, ToolCallDelta)))
    return replace(first, text="".join(delta.text for delta in run if not isinstance(delta, ToolCallDelta)))


def _completion(received: Sequence[CompletionDelta]) -> Completion:
    """Return the completion whose deltas, up to the last one, were received."""
    last = received[-1]
    if last.finish_reason is None:
        raise ValueError("incomplete completion")
    deltas = [delta for item in received for delta in item.deltas]
    calls = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    arguments: list[list[str]] = [[] for call in calls if call.name is not None]
    for call in calls:
        arguments[call.index].append(call.arguments)
    heads = (call for call in calls if call.id is not None and call.name is not None)
    return Completion(
        _text(received),
        finish_reason=last.finish_reason,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
        deltas=tuple(_joined(deltas)),
        tokens=tuple(token for delta in received for token in delta.tokens),
        prompt=tuple(token for delta in received for token in delta.prompt),
        reasoning="".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)),
        tool_calls=tuple(
            ToolCall(str(head.id), str(head.name), "".join(parts)) for head, parts in zip(heads, arguments, strict=True)
        ),
        reasoning_tokens=last.reasoning_tokens,
        stop=last.stop,
    )
