"""Fields of requests that have no effect, and fields that are refused since ignoring them would change the answer.

All other fields are declared in the protocols' models, or unknown: those are ignored and reported. To support a field,
delete its row here and declare it in the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_EMPTY: tuple[Any, ...] = ("", [], {})


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that is refused, unless its value is null or neutral."""

    reason: str
    neutral: tuple[Any, ...] = ()
    """Values that do not change the answer."""

    def accepts(self, value: object) -> bool:
        """Return whether `value` is neutral; as in JSON, true is not 1."""
        return any(value == other and isinstance(value, bool) is isinstance(other, bool) for other in self.neutral)


def _refuse(reason: str, *neutral: Any) -> Refusal:
    """Return the refusal of a field for which empty values and `neutral` ones do not change the answer."""
    return Refusal(reason, (*_EMPTY, *neutral))


Refusals = Mapping[str, Refusal]

HARMLESS = frozenset(
    {
        "annotations",
        "cache_control",
        "content_type",
        "created",
        "created_at",
        "headers",
        "id",
        "include_obfuscation",
        "index",
        "metadata",
        "prompt_cache_breakpoint",
        "reasoning",
        "refusal",
        "strict",
        "timestamp",
    }
)
"""In messages, content parts, tools, tensors and other objects inside a body."""

HARMLESS_PARAMETERS = HARMLESS | frozenset(
    {
        # OpenAI
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
        # ids and labels of user interfaces and proxies
        "chat_id",
        "conversation_id",
        "correlation_id",
        "message_id",
        "parent_id",
        "parent_message_id",
        "request_id",
        "session_id",
        "tags",
        "thread_id",
        "trace_id",
        "user_id",
        # vLLM
        "cache_salt",
        "include_reasoning",
        "spaces_between_special_tokens",
        # llama.cpp and Ollama: caches, timings, and parameters of samplers that are refused themselves
        "cache_prompt",
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "id_slot",
        "keep_alive",
        "mirostat_eta",
        "mirostat_tau",
        "return_progress",
        "timings_per_token",
        "xtc_threshold",
        # Triton: the route decides
        "stream",
    }
)
"""Next to the sampling fields."""

HARMLESS_ITEM = HARMLESS | {
    "async",
    "caller",
    "encrypted_content",
    "logprobs",
    "parsed",
    "parsed_arguments",
    "phase",
    "status",
}
"""In items of OpenAI's Responses API and their parts."""

HARMLESS_RESPONSE = HARMLESS_PARAMETERS | {"access_programs", "background_options", "image", "stream_options"}
"""In OpenAI's Responses API, next to the sampling fields."""

REFUSED_PARAMETERS: Refusals = {
    # Other names of supported fields
    "max_new_tokens": _refuse("not supported. Use max_tokens"),
    "n_predict": _refuse("not supported. Use max_tokens"),
    "num_predict": _refuse("not supported. Use max_tokens"),
    "random_seed": _refuse("not supported. Use seed"),
    "repeat_penalty": _refuse("not supported. Use repetition_penalty", 1),
    "stop_sequences": _refuse("not supported. Use stop"),
    "stop_words": _refuse("not supported. Use stop"),
    # Sampling
    "bad_words_ids": _refuse("not supported. Use bad_words"),
    "beam_width": _refuse("beam search is not supported", 1),
    "do_sample": _refuse("not supported. Set temperature to 0 instead of false", True),
    "dry_multiplier": _refuse("not supported. Omit it", 0),
    "dynatemp_range": _refuse("not supported. Omit it", 0),
    "epsilon_cutoff": _refuse("not supported. Omit it", 0),
    "eta_cutoff": _refuse("not supported. Omit it", 0),
    "length_penalty": _refuse("beam search is not supported", 1),
    "mirostat": _refuse("not supported. Omit it", 0),
    "no_repeat_ngram_size": _refuse("not supported. Use frequency_penalty", 0),
    "num_beams": _refuse("beam search is not supported", 1),
    "tfs_z": _refuse("not supported. Use top_p", 1),
    "top_a": _refuse("not supported. Use top_p", 0),
    "typical_p": _refuse("not supported. Use top_p", 1),
    "use_beam_search": _refuse("beam search is not supported", False),
    "watermark": _refuse("not supported. Omit it", False),
    "xtc_probability": _refuse("not supported. Omit it", 0),
    # Structured output
    "format": _refuse("not supported. Use response_format"),
    "grammar": _refuse("not supported. Use structured_outputs with a grammar in Lark's notation"),
    "guided_decoding_backend": _refuse("llguidance is always used", "auto", "guidance"),
    "guided_whitespace_pattern": _refuse("not supported. Use structured_outputs with a grammar in Lark's notation"),
    "json_schema": _refuse("not supported. Use response_format"),
    # Prompt and output
    "adapter_id": _refuse("adapters are not supported"),
    "decoder_input_details": _refuse("not supported. Use prompt_logprobs", False),
    "detokenize": _refuse("completions are returned as text", True),
    "extra_body": _refuse("put its fields into the body"),
    "include_stop_str_in_output": _refuse("stop strings are never part of the completion", False),
    "options": _refuse("put its fields into the body"),
    "prompt_logprobs": _refuse("the response has no place for them. Use /v1/completions", False),
    "return_full_text": _refuse("not supported. Use echo of /v1/completions", False),
    "return_token_ids": _refuse("not supported. Omit it", False),
    "return_tokens_as_token_ids": _refuse("not supported. Omit it", False),
    "skip_special_tokens": _refuse("special tokens are never part of the completion", True),
    "truncate": _refuse("not supported. Use truncate_prompt_tokens"),
}
"""Next to the sampling fields, in every protocol."""

REFUSED_STRUCTURED_OUTPUTS: Refusals = {
    "structural_tag": _refuse("not supported. Use a grammar"),
    "whitespace_pattern": _refuse("not supported. Use a grammar"),
}
"""In vLLM's `structured_outputs`."""

_NO_CHAT = _refuse("chats are not supported. Send the text as input")

REFUSED_EMBEDDING: Refusals = {
    "add_special_tokens": _refuse("special tokens of the tokenizer are always added to texts", True),
    "chat_template": _NO_CHAT,
    "embedding_type": _refuse("not supported. Use encoding_format", "float"),
    "embedding_types": _refuse("not supported. Use encoding_format", ["float"]),
    "input_type": _refuse("not supported. Use prompt_name"),
    "messages": _NO_CHAT,
    "normalize": _refuse("embeddings are normalized as the model is configured"),
    "task": _refuse("not supported. Use prompt_name"),
    "truncate": _refuse("not supported. Use truncate_prompt_tokens", False),
}
"""In OpenAI's embeddings."""

REFUSED_RERANK: Refusals = {
    "instruction": _refuse("not supported. Put it into the query"),
    "max_chunks_per_doc": _refuse("not supported. Use truncate_prompt_tokens"),
    "max_tokens_per_doc": _refuse("not supported. Use truncate_prompt_tokens"),
    "rank_fields": _refuse("documents are texts. Put the fields into the text", ["text"]),
    "raw_scores": _refuse("not supported. Omit it", False),
    "truncate": _refuse("not supported. Use truncate_prompt_tokens", False),
}
"""In rerank and score."""

REFUSED_COMPLETION: Refusals = {
    "add_special_tokens": _refuse("special tokens of the tokenizer are always added", True),
    "suffix": _refuse("insertion is not supported"),
}
"""In OpenAI's completions."""

_ONLY_TEXT = "only text is generated"

REFUSED_CHAT: Refusals = {
    "add_special_tokens": _refuse("special tokens come from the chat template only", False),
    "audio": _refuse(_ONLY_TEXT),
    "chat_template": _refuse("the model's own chat template is used"),
    "documents": _refuse("not supported. Put them into a message or chat_template_kwargs"),
    "echo": _refuse("not supported. Use /v1/completions", False),
    "mm_processor_kwargs": _refuse("only text is supported"),
    "modalities": _refuse(_ONLY_TEXT, ["text"]),
    "moderation": _refuse("moderation is not supported"),
    "safe_prompt": _refuse("not supported. Put it into a message", False),
    "suffix": _refuse("insertion is not supported"),
    # An empty object turns the search on.
    "web_search_options": Refusal("web search is not supported"),
}
"""In OpenAI's chat completions."""

REFUSED_MESSAGES: Refusals = {
    "container": _refuse("code execution is not supported"),
    "context_management": _refuse("not supported. Shorten the messages"),
    "mcp_servers": _refuse("not supported. Let the client run tools"),
}
"""In Anthropic's messages."""

REFUSED_BLOCK: Refusals = {"citations": _refuse("not supported. Omit it")}
"""In Anthropic's text blocks."""

REFUSED_MESSAGE: Refusals = {
    "audio": _refuse("only text is supported"),
    "images": _refuse("only text is supported"),
}
"""In OpenAI's messages."""

_NOT_STORED = "responses are not stored. Send the previous items as input"

REFUSED_RESPONSE: Refusals = {
    "background": _refuse("not supported. Wait for the response, or stream it", False),
    "context_management": _refuse("input is not compacted. Send less of it"),
    "conversation": _refuse(_NOT_STORED),
    "functions": _refuse("not supported. Use tools"),
    "max_completion_tokens": _refuse("not supported. Use max_output_tokens"),
    "messages": _refuse("not supported. Use input"),
    "moderation": _refuse("moderation is not supported"),
    "n": _refuse("one response is generated. Send several requests", 1),
    "previous_response_id": _refuse(_NOT_STORED),
    "prompt": _refuse("prompts are not stored. Send the text as instructions and input"),
    "reasoning_effort": _refuse("not supported. Use reasoning.effort"),
    "truncation": _refuse("input is not truncated. Send less of it, or disabled", "disabled"),
}
"""In OpenAI's Responses API."""
