"""Completion streams over a scripted engine: no model, no threads."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from devtools.paths import DEMO_MODEL
from predictor.engine.engine import Engine
from predictor.errors import DeadlineExceeded, EngineStopped, GenerationFailed
from predictor.generation import output_notations, output_processor
from predictor.generation.chat_template import ChatTemplate
from predictor.generation.output_processor import CompletionStream
from predictor.generation.prompts import Prompts
from predictor.types import (
    Chat,
    Completion,
    CompletionDelta,
    FinishedSequence,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Step,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)


class ScriptedStream:
    """Yields steps; then raises an error, or waits to be cancelled if there is no finish reason."""

    submitted = 0.0
    queue_seconds: float | None = 0.0
    first_token_seconds: float | None = 0.0

    def __init__(self, script: Sequence[Step | Exception]) -> None:
        self._script = script
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[Step]:
        for item in self._script:
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        self.closed = True


class ScriptedEngine:
    def __init__(self, *scripts: Sequence[Step | Exception]) -> None:
        self._scripts = scripts
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.streams: list[ScriptedStream] = []

    def submit(self, prompts: Sequence[tuple[list[int], SamplingParams]], *_: Any) -> list[ScriptedStream]:
        self.submitted = list(prompts)
        self.streams = [ScriptedStream(script) for script in self._scripts]
        return self.streams


@dataclass
class Submitted:
    stream: CompletionStream
    engine: ScriptedEngine
    finished: list[FinishedSequence] = field(default_factory=list)
    tokens: list[tuple[int, float | None]] = field(default_factory=list)

    def deltas(self) -> list[CompletionDelta]:
        async def read() -> list[CompletionDelta]:
            return [delta async for delta in self.stream.deltas()]

        return asyncio.run(read())

    def complete(self) -> list[Completion]:
        return asyncio.run(self.stream.complete())


def submit(prompts: Prompts, request: GenerationRequest, *scripts: Sequence[Step | Exception]) -> Submitted:
    engine = ScriptedEngine(*scripts)
    submitted = Submitted(cast(Any, None), engine)
    submitted.stream = output_processor.submit(
        [prompts.encode(request)],
        tokenizer=prompts.tokenizer,
        engine=cast(Engine, engine),
        deadline=1.0,
        on_finished=submitted.finished.append,
        on_tokens=lambda count, gap: submitted.tokens.append((count, gap)),
    )
    return submitted


@pytest.fixture
def ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {text: tokenizer.encode(text, add_special_tokens=False)[0] for text in "12345"}


def test_complete_joins_steps_and_counts_end_of_sequence(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]
) -> None:
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    submitted = submit(
        prompts, GenerationRequest("1"), [Step([ids["1"], ids["2"]]), Step([eos], FinishReason.EOS_TOKEN)]
    )
    [completion] = submitted.complete()
    assert completion == Completion(
        "12",
        finish_reason=FinishReason.EOS_TOKEN,
        prompt_tokens=2,
        completion_tokens=3,
        deltas=(TextDelta("12"),),
        tokens=(),
    )
    [finished] = submitted.finished
    assert (finished.outcome, finished.prompt_tokens, finished.completion_tokens) == ("eos_token", 2, 3)


def test_complete_at_length_keeps_last_token(prompts: Prompts, ids: dict[str, int]) -> None:
    [completion] = submit(prompts, GenerationRequest("1"), [Step([ids["1"]], FinishReason.LENGTH)]).complete()
    assert completion.text == "1"


def test_deltas_stop_string_ends_sequence_and_closes_its_stream(prompts: Prompts, ids: dict[str, int]) -> None:
    request = GenerationRequest("1", SamplingParams(stop=("3",)))
    submitted = submit(prompts, request, [Step([ids["1"]]), Step([ids["2"], ids["3"], ids["4"]]), Step([ids["5"]])])
    first, last = submitted.deltas()
    assert (first.text, first.finish_reason) == ("1", None)
    assert (last.text, last.finish_reason, last.completion_tokens) == ("2", FinishReason.STOP_SEQUENCE, 3)
    assert submitted.engine.streams[0].closed
    assert [finished.outcome for finished in submitted.finished] == ["stop_sequence"]


def test_deltas_tokens_behind_a_stop_string_are_not_counted(prompts: Prompts, ids: dict[str, int]) -> None:
    request = GenerationRequest("1", SamplingParams(stop=("3",)))
    submitted = submit(prompts, request, [Step([ids["1"]]), Step([ids["2"], ids["3"], ids["4"]])])
    assert submitted.deltas()[-1].completion_tokens == 3
    assert [count for count, _ in submitted.tokens] == [1, 2]


def test_deltas_echo_comes_first(prompts: Prompts, ids: dict[str, int]) -> None:
    request = GenerationRequest("5", echo=True)
    first, _ = submit(prompts, request, [Step([ids["1"]], FinishReason.LENGTH)]).deltas()
    assert (first.text, first.completion_tokens) == ("5", 0)


def test_deltas_logprobs_become_tokens(prompts: Prompts, ids: dict[str, int]) -> None:
    logprobs = (TokenLogprob(ids["1"], -0.5), TokenLogprob(ids["2"], -1.5))
    step = Step([ids["1"], ids["2"]], FinishReason.LENGTH, logprobs)
    [delta] = submit(prompts, GenerationRequest("1"), [step]).deltas()
    assert [(token.text, token.logprob) for token in delta.tokens] == [("1", -0.5), ("2", -1.5)]


def test_submit_several_completions_counts_seed_up(prompts: Prompts, ids: dict[str, int]) -> None:
    request = GenerationRequest("1", SamplingParams(seed=7), n=3)
    end = [Step([ids["1"]], FinishReason.LENGTH)]
    submitted = submit(prompts, request, end, end, end)
    assert [sampling.seed for _, sampling in submitted.engine.submitted] == [7, 8, 9]
    assert [completion.text for completion in submitted.complete()] == ["1", "1", "1"]
    assert sorted(finished.index for finished in submitted.finished) == [0, 1, 2]


def test_deltas_tokens_are_counted_with_gaps_after_the_first(prompts: Prompts, ids: dict[str, int]) -> None:
    submitted = submit(
        prompts, GenerationRequest("1"), [Step([ids["1"]]), Step([ids["2"], ids["3"]], FinishReason.LENGTH)]
    )
    submitted.deltas()
    (first, no_gap), (second, gap) = submitted.tokens
    assert (first, second, no_gap) == (1, 2, None)
    assert gap is not None
    assert gap >= 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(EngineStopped("stopped"), "failed"), (DeadlineExceeded("late"), "deadline")],
    ids=["stopped", "deadline"],
)
def test_deltas_failure_of_one_sequence_ends_all(
    prompts: Prompts, ids: dict[str, int], error: Exception, outcome: str
) -> None:
    submitted = submit(prompts, GenerationRequest("1", n=2), [Step([ids["1"]])] * 1 + [error], [Step([ids["2"]])])
    with pytest.raises(type(error)):
        submitted.deltas()
    assert [finished.outcome for finished in submitted.finished] == [outcome, outcome]
    assert all(stream.closed for stream in submitted.engine.streams)


def test_complete_deadline_has_partial_texts(prompts: Prompts, ids: dict[str, int]) -> None:
    submitted = submit(prompts, GenerationRequest("1"), [Step([ids["1"]]), Step([ids["2"]]), DeadlineExceeded("late")])
    with pytest.raises(DeadlineExceeded) as raised:
        submitted.complete()
    assert raised.value.partial == ("12",)


def test_deltas_stream_without_finish_reason_fails(prompts: Prompts, ids: dict[str, int]) -> None:
    with pytest.raises(GenerationFailed, match="without a finish reason"):
        submit(prompts, GenerationRequest("1"), [Step([ids["1"]])]).deltas()


def test_close_unread_stream_reports_cancelled_once(prompts: Prompts, ids: dict[str, int]) -> None:
    submitted = submit(prompts, GenerationRequest("1"), [Step([ids["1"]])])
    submitted.stream.close()
    submitted.stream.close()
    [finished] = submitted.finished
    assert replace(finished, total_seconds=0.0) == FinishedSequence(
        index=0,
        outcome="cancelled",
        prompt_tokens=2,
        completion_tokens=0,
        admitted_at=0.0,
        total_seconds=0.0,
        queue_seconds=0.0,
        first_token_seconds=0.0,
    )


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Once", " upon a time"),
        (Chat(({"role": "user", "content": "Once"},)), "upon a time"),
        (Chat(({"role": "assistant", "content": "Once"},)), " upon a time"),
    ],
    ids=["text", "generation-prompt", "generation-prompt-of-text"],
)
def test_complete_first_token_keeps_its_space_unless_a_message_begins(
    sentencepiece_tokenizer: PreTrainedTokenizerBase, prompts: Prompts, prompt: str | Chat, text: str
) -> None:
    sentencepiece_tokenizer.chat_template = (
        "{{ messages[0].content }}{% if messages[0].role == 'user' %}<|assistant|>{% else %}:{% endif %}"
    )
    ids = sentencepiece_tokenizer.encode("Once upon a time", add_special_tokens=False)[1:]
    step = Step(ids, FinishReason.LENGTH, tuple(TokenLogprob(token_id, -1.0) for token_id in ids))
    prompts = replace(
        prompts,
        tokenizer=sentencepiece_tokenizer,
        chat_template=ChatTemplate(sentencepiece_tokenizer),
        vocabulary_tokens=len(sentencepiece_tokenizer),
    )
    [completion] = submit(prompts, GenerationRequest(prompt), [step]).complete()
    assert completion.text == text
    assert "".join(token.text for token in completion.tokens) == text


def test_complete_echo_and_continuation_are_the_whole_text(
    sentencepiece_tokenizer: PreTrainedTokenizerBase, prompts: Prompts
) -> None:
    ids = sentencepiece_tokenizer.encode("Once upon a time", add_special_tokens=False)[1:]
    prompts = replace(prompts, tokenizer=sentencepiece_tokenizer, vocabulary_tokens=len(sentencepiece_tokenizer))
    request = GenerationRequest("Once", SamplingParams(stop=(" time",)), echo=True)
    [completion] = submit(prompts, request, [Step(ids, FinishReason.LENGTH)]).complete()
    assert completion.text == "Once upon a"


@pytest.fixture
def mistral(prompts: Prompts) -> Prompts:
    """Prompts of a model whose markers are special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, chat_template="{{ messages[0].content }}[TOOL_CALLS][ARGS]")
    tokenizer.add_special_tokens({"extra_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "[/INST]", "<|eom_id|>"]})
    output_format, _ = output_notations.choose(tokenizer)
    return replace(
        prompts,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(tokenizer),
        vocabulary_tokens=len(tokenizer),
        output_format=output_format,
    )


NOW = {"type": "function", "function": {"name": "now"}}
CHAT = Chat(({"role": "user", "content": "1"},), (NOW,))


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
def test_tool_call_with_special_tokens_is_found_and_others_are_dropped(mistral: Prompts, tokens_per_step: int) -> None:
    token_ids = mistral.tokenizer.encode("OK[/INST].[TOOL_CALLS]now[ARGS]{}", add_special_tokens=False)
    steps = [Step(token_ids[start : start + tokens_per_step]) for start in range(0, len(token_ids), tokens_per_step)]
    steps.append(Step([2], FinishReason.EOS_TOKEN))
    [completion] = submit(mistral, GenerationRequest(CHAT, parse_output=True), steps).complete()
    assert completion.text == "OK."
    [call] = completion.tool_calls
    assert (call.name, call.arguments) == ("now", "{}")
    assert completion.finish_reason is FinishReason.TOOL_CALLS
    [as_text] = submit(mistral, GenerationRequest(CHAT), steps).complete()
    assert as_text.text == "OK.now{}"


def test_tool_call_cut_off_by_its_length_has_the_arguments_so_far(mistral: Prompts) -> None:
    token_ids = mistral.tokenizer.encode('[TOOL_CALLS]now[ARGS]{"a', add_special_tokens=False)
    steps = [Step(token_ids, FinishReason.LENGTH)]
    [completion] = submit(mistral, GenerationRequest(CHAT, parse_output=True), steps).complete()
    assert [call.arguments for call in completion.tool_calls] == ['{"a']
    assert completion.finish_reason is FinishReason.LENGTH


def test_arguments_of_several_tokens_in_a_step_are_one_delta(mistral: Prompts) -> None:
    token_ids = mistral.tokenizer.encode('[TOOL_CALLS]now[ARGS]{"abc": 12345}', add_special_tokens=False)
    [first, *_] = submit(
        mistral, GenerationRequest(CHAT, parse_output=True), [Step(token_ids, FinishReason.LENGTH)]
    ).deltas()
    [head, arguments] = first.deltas
    assert head == ToolCallDelta(0, id=head.id, name="now")  # type: ignore[union-attr]
    assert arguments == ToolCallDelta(0, '{"abc": 12345}')


def test_end_tokens_of_the_notation_stop_chats_and_nothing_else(mistral: Prompts) -> None:
    output_format, _ = output_notations.choose(mistral.output_format.tokenizer, "llama3_json")  # type: ignore[union-attr]
    llama = replace(mistral, output_format=output_format)
    [end] = output_format.end_token_ids
    assert llama.encode(GenerationRequest(CHAT, parse_output=True)).sampling.stop_token_ids == (end,)
    assert llama.encode(GenerationRequest(CHAT)).sampling.stop_token_ids == ()
    assert llama.encode(GenerationRequest("1", parse_output=True)).sampling.stop_token_ids == ()


def test_chat_without_tools_and_reasoning_is_not_parsed(mistral: Prompts) -> None:
    chat = replace(CHAT, tools=())
    assert mistral.encode(GenerationRequest(chat, parse_output=True)).output_parser is None
    [completion] = submit(
        mistral,
        GenerationRequest(chat, parse_output=True),
        [Step(mistral.tokenizer.encode(" 1\n", add_special_tokens=False), FinishReason.LENGTH)],
    ).complete()
    assert completion.text == " 1\n"


def test_reasoning_tokens_are_counted_without_markers_and_end_of_sequence(mistral: Prompts) -> None:
    output_format, _ = output_notations.choose(mistral.output_format.tokenizer, "none", "think")  # type: ignore[union-attr]
    thinking = replace(mistral, output_format=output_format)
    encode = partial(mistral.tokenizer.encode, add_special_tokens=False)
    thought = encode("Hm. é")
    steps = [
        Step([*encode("<think>"), *thought, *encode("</think>"), *encode("Hi")]),
        Step([2], FinishReason.EOS_TOKEN),
    ]
    [completion] = submit(thinking, GenerationRequest(CHAT, parse_output=True), steps).complete()
    assert (completion.reasoning, completion.text) == ("Hm. é", "Hi")
    assert completion.reasoning_tokens == len(thought)
