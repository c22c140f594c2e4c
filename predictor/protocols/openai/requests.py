"""OpenAI's requests: JSON bodies -> generation requests."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from predictor.errors import InvalidRequest
from predictor.protocols.json_body import json_schema
from predictor.protocols.json_object import validate_body
from predictor.protocols.openai.schemas import BaseRequest, ChatCompletionRequest, CompletionRequest, Message
from predictor.types import Chat, GenerationRequest, SamplingParams

COMPLETION_SCHEMA = json_schema(CompletionRequest)
CHAT_COMPLETION_SCHEMA = json_schema(ChatCompletionRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedRequest:
    """Generation requests of one body, and the options of its response."""

    requests: list[GenerationRequest]
    """One per prompt, in order; a chat is one."""
    n: int
    """Completions per prompt."""
    candidates: int
    """Completions to generate per prompt, of which the best are returned."""
    stream: bool
    id: str
    created: int
    """Unix time in seconds."""
    model: str
    is_chat: bool
    logprobs: int | None
    """Number of most probable tokens to report at each position; None: report no log probabilities."""
    prompt_logprobs: int | None
    """The same for the prompt, in vLLM's field."""
    echo: bool
    """Whether the prompt's text, and its tokens if there are log probabilities, come before the completion's."""
    include_usage: bool
    """Whether a stream reports its usage; whole responses always do."""
    include_service_tier: bool
    has_tools: bool
    """Whether the assistant may call tools."""
    uses_functions: bool
    """Whether calls are reported in the deprecated `function_call`."""


def decode_completion(body: bytes) -> DecodedRequest:
    """Decode a completion request: one generation request per prompt.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong or not supported; the message names it.
    """
    content = validate_body(CompletionRequest, body)
    sampling = _sampling_params(content, content.logprobs)
    if content.echo and content.logprobs is not None:
        sampling = replace(sampling, prompt_logprobs=max(content.logprobs, content.prompt_logprobs or 0))
    prompts = [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in content.prompt]
    candidates = content.num_candidates(content.n)
    requests = [GenerationRequest(prompt, sampling, candidates, content.echo) for prompt in prompts]
    return _decoded(content, requests, content.logprobs, echo=content.echo)


def decode_chat_completion(body: bytes) -> DecodedRequest:
    """Decode a chat completion request: one generation request.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong or not supported; the message names it.
    """
    content = validate_body(ChatCompletionRequest, body)
    limits = {content.max_tokens, content.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise _invalid("max_tokens", "differs from max_completion_tokens, which replaces it. Omit it")
    if content.top_logprobs and not content.logprobs:
        raise _invalid("top_logprobs", "needs logprobs to be true")
    logprobs = (content.top_logprobs or 0) if content.logprobs else None
    sampling = replace(_sampling_params(content, logprobs), max_tokens=next(iter(limits), None))
    request = GenerationRequest(to_chat(content), sampling, content.num_candidates(content.n), parse_output=True)
    return _decoded(content, [request], logprobs)


def to_chat(content: ChatCompletionRequest) -> Chat:
    """Return the chat of a request.

    Raises:
        InvalidRequest: fields contradict each other.
    """
    continues = content.continue_final_message or content.messages[-1].prefix
    if continues and "add_generation_prompt" in content.model_fields_set and content.add_generation_prompt:
        raise _invalid("add_generation_prompt", "begins a new message. Omit it, or continue_final_message and prefix")
    return Chat(
        tuple(_template_messages(content.messages)),
        variables=content.chat_template_kwargs,
        reasoning_effort=content.reasoning_effort or None,
        continue_final_message=continues,
        add_generation_prompt=content.add_generation_prompt,
        **content.chat_fields(),
    )


def _sampling_params(content: BaseRequest, logprobs: int | None) -> SamplingParams:
    if content.stream and content.num_candidates(content.n) > content.n:
        raise _invalid("best_of", "is not possible in a stream, since all candidates are compared. Omit it or stream")
    if content.stream and content.prompt_logprobs is not None:
        raise _invalid("prompt_logprobs", "is not possible in a stream. Omit it or stream; completions have echo")
    return replace(content.to_sampling_params(logprobs, content.n), prompt_logprobs=content.prompt_logprobs)


def _template_messages(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """Yield the messages for the chat template; deprecated function calls become tool calls."""
    call_id = ""
    for index, message in enumerate(messages):
        fields = message.to_template_message()
        if message.function_call is not None:
            call_id = f"call{index:05}"
            call = {"id": call_id, "type": "function", "function": message.function_call.model_dump()}
            fields["tool_calls"] = [call]
        elif message.role == "function":
            fields |= {"role": "tool", "tool_call_id": call_id}
        yield fields


def _invalid(field: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {reason}.", field)


def _decoded(
    content: BaseRequest, requests: list[GenerationRequest], logprobs: int | None, *, echo: bool = False
) -> DecodedRequest:
    is_chat = isinstance(content, ChatCompletionRequest)
    return DecodedRequest(
        requests=requests,
        n=content.n,
        candidates=requests[0].n,
        stream=content.stream,
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=content.model,
        is_chat=is_chat,
        logprobs=logprobs,
        prompt_logprobs=content.prompt_logprobs,
        echo=echo,
        include_usage=content.stream_options is not None and content.stream_options.include_usage,
        include_service_tier=isinstance(content, ChatCompletionRequest) and content.service_tier is not None,
        has_tools=any(isinstance(request.prompt, Chat) and request.prompt.tools for request in requests),
        uses_functions=isinstance(content, ChatCompletionRequest) and bool(content.functions),
    )
