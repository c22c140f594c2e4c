"""Data types shared by protocols, generation and engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

Message = Mapping[str, Any]
"""One chat message as the chat template takes it: at least `role` and `content`."""

MIN_LOGPROB = -9999.0
"""Smallest log probability reported, as in OpenAI's API: JSON has no infinity."""

WHOLE_CONTEXT = -1
"""Value of `truncate_prompt_tokens` for all that the context has left after `max_tokens`."""

UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""Decoded in place of bytes that form a character only together with the next token."""


class Task(StrEnum):
    """What a model does; the last two give one vector for each input, without generating."""

    GENERATE = "generate"
    EMBED = "embed"
    CLASSIFY = "classify"


class FinishReason(StrEnum):
    """Reason why a completion ended, in the words of the Open Inference Protocol's generate extension."""

    EOS_TOKEN = "eos_token"  # noqa: S105
    LENGTH = "length"
    STOP_SEQUENCE = "stop_sequence"
    TOOL_CALLS = "tool_calls"


CANCELLED, DEADLINE, FAILED = "cancelled", "deadline", "failed"
"""Outcomes of a sequence without a finish reason: client disconnected, request timed out, engine failed."""


COMPUTED = "computed"
"""Outcome of a request whose inputs were embedded or classified."""


class GrammarKind(StrEnum):
    """Notation of a `StructuredOutput`."""

    JSON_SCHEMA = "JSON schema"
    REGEX = "regular expression"
    CHOICE = "list of choices"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the text of a completion must follow."""

    kind: GrammarKind
    value: str
    """JSON of the schema or of the list of choices, a regular expression, or a grammar in Lark's notation."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The name of an API key, its share of the server, and its limits; None: no limit."""

    name: str
    weight: int = 1
    """Tokens that it gets for each one of a caller with weight 1 while both have waiting sequences."""
    share: float = 1.0
    """Its weight over the sum of all keys' weights."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Tokens of prompts and completions."""
    concurrent_sequences: int | None = None
    """Sequences that run or wait."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping parameters; None means the model's default."""

    max_tokens: int | None = None
    """Maximum number of new tokens; without any, the prompt is only checked."""
    min_tokens: int = 0
    """Minimum number of new tokens before an end-of-sequence token, stop token or stop string ends the completion."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    """Cumulative probability kept, 0 <= top_p <= 1; at least one token is kept."""
    top_k: int | None = None
    """Number of most probable tokens kept; 0 keeps all."""
    min_p: float | None = None
    """Keep tokens with at least this fraction of the most probable token's probability, 0 <= min_p <= 1; 0 is off."""
    repetition_penalty: float | None = None
    """Divides positive logits, and multiplies negative ones, of tokens of the prompt and the completion; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that occur in the completion."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each occurrence in the completion."""
    no_repeat_ngram_size: int = 0
    """Sequences of this number of tokens occur once at most in prompt and completion; 0 is off."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never sampled."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that are not sampled as the first of the completion."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number) added to the token's logit."""
    allowed_token_ids: tuple[int, ...] = ()
    """The only tokens that are sampled; empty: all."""
    bad_words: tuple[str, ...] = ()
    """Words that the completion does not contain, by the tokens with which they begin a text or follow a space."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that the completion never ends, even if the prompt begins them."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, in addition to the end of sequence; not part of its text."""
    ignore_eos: bool = False
    """Continue after the model's end of sequence, up to `max_tokens`."""
    seed: int | None = None
    """Makes a sampled completion repeatable on the same version, alone or among others; None: random."""
    logprobs: int | None = None
    """Report log probabilities of the sampled token and of this number of most probable ones; None: report none."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    truncate_prompt_tokens: int | None = None
    """Use this number of the prompt's last tokens; None: all."""
    structured_output: StructuredOutput | None = None
    """What the text follows."""
    priority: int = 0
    """Order among the caller's waiting sequences, as in vLLM: a lower one starts earlier."""
    token_masks: tuple[Callable[[], Callable[..., Any]], ...] = ()
    """Factories of further rules for the tokens that may follow; each sequence gets its own `TokenMask`."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages for the model's chat template, and the tools that the template may describe to the model."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""
    requires_tool_call: bool = False
    """The assistant calls one of the tools at least, instead of writing a message."""
    strict_tools: frozenset[str] = frozenset()
    """Names of the tools whose arguments always follow their schema; those of required calls do in any case."""
    parallel_tool_calls: bool = True
    """The assistant may call several tools in one message."""
    reasoning_effort: str | None = None
    """Sets the variables by which the template controls the reasoning, if it has any; "none" turns it off."""
    continue_final_message: bool = False
    """Continue the last message, which is the assistant's, instead of beginning a new one."""
    add_generation_prompt: bool = True
    """Begin the assistant's message."""

    @property
    def continued_text(self) -> str | None:
        """Text of the message that is continued; None if a new one begins."""
        return str(self.messages[-1].get("content") or "") if self.continue_final_message else None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, as raw text, token ids or a chat, and its sampling parameters."""

    prompt: str | tuple[int, ...] | Chat
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    """Number of independent completions; the k-th uses `seed + k`."""
    echo: bool = False
    """Put the prompt's text before the completion's."""
    parse_output: bool = False
    """Separate the reasoning and the tool calls of a chat from its text."""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """The tokens of a prompt."""

    token_ids: list[int]
    texts: list[str] | None
    """As in the tokenizer's vocabulary."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of a token, before temperature and penalties, and of the most probable ones.

    Finite, and not less than MIN_LOGPROB.
    """

    token_id: int
    logprob: float | None
    """None for the first token of a prompt."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability) of the most probable tokens, best first."""
    rank: int | None = None
    """1 for the most probable token; None without a log probability."""


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens that one or more decode steps added to a sequence; the last one has a finish reason."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token id if requested, else empty."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token of the prompt if requested, in the first step."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token as text, with its log probability."""

    id: int
    text: str
    """Contains UNFINISHED_CHARACTER if the token is only part of a character."""
    logprob: float | None
    """None for the first token of a prompt."""
    special: bool = False
    top: tuple["Token", ...] = ()
    """The most probable tokens at this position, best first."""
    rank: int | None = None
    """1 for the most probable token at this position; None without a log probability."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text added to a completion."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text added to the reasoning before a completion's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """Beginning of a tool call, or JSON added to its arguments."""

    index: int
    """Of the call in the completion; all deltas of a call come before those of the next."""
    arguments: str = ""
    """Part of the arguments' JSON; all parts together are the JSON of an object, unless the completion is cut off."""
    id: str | None = None
    """In the first delta of a call, as is `name`."""
    name: str | None = None


OutputDelta = TextDelta | ReasoningDelta | ToolCallDelta


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One complete tool call."""

    id: str
    name: str
    arguments: str
    """JSON of an object, unless the completion was cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionDelta:
    """Addition to one completion of a stream; the last one of each completion has a finish reason."""

    index: int
    """Completion that it belongs to: those of the first request come first, `n` of each."""
    deltas: tuple[OutputDelta, ...] = ()
    """Typed additions, in order; empty if all new text is held back."""
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated so far, the end-of-sequence token included."""
    finish_reason: FinishReason | None = None
    reasoning_tokens: int = 0
    """Those of `completion_tokens` that are reasoning."""
    stop: str | None = None
    """Stop string that ended the completion."""
    tokens: tuple[Token, ...] = ()
    """New tokens if requested. Their text may come later: it is held back while it may begin a stop string."""
    prompt: tuple[Token, ...] = ()
    """The prompt's tokens if their log probabilities are requested, in the first delta of a completion."""

    @property
    def text(self) -> str:
        """All text added, "" if none; without reasoning."""
        return "".join(delta.text for delta in self.deltas if isinstance(delta, TextDelta))


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSequence:
    """Outcome, token counts and timings of a sequence; durations start at its admission."""

    index: int
    """Completion that it belongs to, as in `CompletionDelta`."""
    outcome: str
    """A finish reason, CANCELLED, DEADLINE or FAILED."""
    prompt_tokens: int
    completion_tokens: int
    admitted_at: float
    """By `time.monotonic()`."""
    total_seconds: float
    """Until its end."""
    queue_seconds: float | None
    """Until the first step that computed part of the prompt; None if it never ran."""
    first_token_seconds: float | None
    """Until the first token; None without tokens."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete response to one generation request."""

    text: str
    _: KW_ONLY
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    """Generated tokens, the end-of-sequence token included."""
    deltas: tuple[OutputDelta, ...] = ()
    """All of the output in order, from which `text`, `reasoning` and `tool_calls` are."""
    tokens: tuple[Token, ...] = ()
    """All generated tokens, if requested."""
    prompt: tuple[Token, ...] = ()
    """The prompt's tokens, if their log probabilities are requested."""
    reasoning: str = ""
    """Text of the reasoning before `text`."""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_tokens: int = 0
    """Those of `completion_tokens` that are reasoning."""
    stop: str | None = None
    """Stop string that ended the completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """What is computed from the outputs of a model, and from the texts before."""

    task: Task
    """EMBED or CLASSIFY."""
    modes: tuple[str, ...] = ()
    """Of an embedding: names in `models.pooling.MODES`, whose results are concatenated."""
    normalize: bool = False
    """Whether embeddings have length 1."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Texts to put before others, by name."""
    default_prompt_name: str | None = None
    lowercase: bool = False
    """Whether texts are converted to lower case."""
    max_tokens: int | None = None
    """Length that the snapshot sets for a text; None: the model's."""
    activation: str = ""
    """Of a classifier's logits: `sigmoid`, `softmax` or `none`."""

    @property
    def properties(self) -> dict[str, str]:
        """Return the properties for the model's metadata."""
        if self.task is Task.CLASSIFY:
            return {"activation": self.activation}
        prompts = {"prompts": ", ".join(sorted(self.prompts))} if self.prompts else {}
        return {
            "pooling": "+".join(self.modes),
            "normalized": str(self.normalize).lower(),
            **prompts,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingRequest:
    """Texts, token ids or pairs of texts, each of which gets an embedding or scores."""

    task: Task
    """EMBED or CLASSIFY."""
    inputs: Sequence[str | tuple[int, ...] | tuple[str, str]]
    """At least one; pairs are for classifiers only."""
    single_score: bool = False
    """Whether the classifier needs to have exactly one label, as rerankers have."""
    dimensions: int | None = None
    """Number of leading dimensions of embeddings to keep; None: all."""
    prompt_name: str | None = None
    """Name of the model's prompt to put before each text; None: its default."""
    truncate_prompt_tokens: int | None = None
    """Number of tokens of an input to keep; None: an input that is too long is an error."""


@dataclass(frozen=True, slots=True)
class Pooled:
    """Embeddings or scores."""

    vectors: "NDArray[numpy.float32]"
    """One row for each input: of the embedding, or the score of each label."""
    prompt_tokens: int
    """Of all inputs."""
