"""Request fields for sampling and timeouts, shared by the protocols, which differ in their names and positions only."""

import math
import sys
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from predictor.errors import InvalidRequest
from predictor.protocols.field_tables import HARMLESS_PARAMETERS, REFUSED_PARAMETERS
from predictor.protocols.field_validators import wrap_string
from predictor.protocols.structured_output_fields import StructuredOutputFields, parse_json
from predictor.types import WHOLE_CONTEXT, SamplingParams

TIMEOUT_HEADER = "x-request-timeout-seconds"
"""Header, in lower case, with which a client sets a shorter timeout than the server's."""

MAX_STOP = 256
UNLIMITED = -1
"""Value of max_tokens for all that the context has left."""
MAX_TOKENS = "Maximum number of new tokens; -1 and more than the context has left: all that it has left; 0: none."
MAX_LOGPROBS = 20
"""OpenAI's maximum of top_logprobs."""
MAX_COMPLETIONS = 128
"""OpenAI's maximum of n."""


def _parse_list(value: object) -> object:
    """Return the list in a string of JSON; any other string is one value."""
    return parse_json(value) if isinstance(value, str) and value.startswith("[") else value


def _drop_empty(strings: list[str | None]) -> list[str]:
    return [string for string in strings if string]


def _to_limit(max_tokens: int) -> int:
    return sys.maxsize if max_tokens == UNLIMITED else max_tokens


def _to_seed(value: int) -> int | None:
    """Return an integer of any size within the generator's range; -1 means a random seed."""
    return None if value == -1 else (value + 2**63) % 2**64 - 2**63


MaxTokens = Annotated[int, Field(ge=UNLIMITED), AfterValidator(_to_limit)]
"""Maximum number of new tokens, limited later to what the context has left."""

_Strings = Annotated[list[str | None], Field(max_length=MAX_STOP)]

Stop = Annotated[
    list[str | None],
    Field(max_length=MAX_STOP),
    BeforeValidator(wrap_string, str | _Strings),
    AfterValidator(_drop_empty),
]
"""A stop string, or a list of them; empty ones are dropped."""

StopTokenIds = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_parse_list), Field(max_length=MAX_STOP)]


def _check_truncation(tokens: int) -> int:
    if tokens == 0:
        raise PydanticCustomError("truncation", "expected -1 or at least 1")
    return tokens


TruncatePromptTokens = Annotated[int, Field(ge=WHOLE_CONTEXT), AfterValidator(_check_truncation)]

_TokenId = Annotated[int, Field(ge=0)]
_LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(parse_json, dict[str, float] | str),
]
PromptLogprobs = Annotated[
    int,
    Field(
        ge=0, le=MAX_LOGPROBS, description="Number of most probable tokens to report at each position of the prompt."
    ),
]


class SamplingFields(StructuredOutputFields):
    """Sampling parameters by vLLM's names.

    Defaults are those of `SamplingParams`: None means the default of the model's generation config.
    """

    harmless = HARMLESS_PARAMETERS
    refused = REFUSED_PARAMETERS

    max_tokens: MaxTokens | None = Field(default=None, description=MAX_TOKENS)
    min_tokens: int = Field(
        default=0, ge=0, description="Minimum number of new tokens before a stop condition ends it."
    )
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="Cumulative probability kept.")
    top_k: int | None = Field(default=None, ge=-1, description="Number of most probable tokens kept; 0 and -1: all.")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Least probability kept, as a part of the most probable token's; 0: all."
    )
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="1 is off.")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    stop: Annotated[Stop, BeforeValidator(_parse_list, str | _Strings)] = Field(
        default=[], description="Strings that end the completion; not part of it."
    )
    stop_token_ids: StopTokenIds = Field(default=[], description="Tokens that end the completion.")
    bad_words: Annotated[Stop, BeforeValidator(_parse_list, str | _Strings)] = Field(
        default=[], description="Words that the completion does not contain."
    )
    logit_bias: _LogitBias = Field(default={}, description="Numbers to add to logits, by token id.")
    allowed_token_ids: (
        Annotated[list[_TokenId], Field(min_length=1), BeforeValidator(_parse_list, list[_TokenId] | str)] | None
    ) = Field(default=None, description="The only tokens that are sampled.")
    truncate_prompt_tokens: TruncatePromptTokens | None = Field(
        default=None,
        description="Use this number of the prompt's last tokens; -1: all that the context has left after max_tokens.",
    )
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COMPLETIONS,
        description="Number of completions of which the most probable ones per token are returned.",
    )
    ignore_eos: bool = Field(default=False, description="Continue after the model's end of sequence.")
    seed: Annotated[int, AfterValidator(_to_seed)] | None = Field(
        default=None, description="Makes sampling repeatable; -1: random."
    )
    priority: int = Field(
        default=0, description="Order among the waiting requests of the same API key; a lower one starts earlier."
    )

    def num_candidates(self, n: int = 1) -> int:
        """Return the number of completions to generate, of which `n` are returned.

        Raises:
            InvalidRequest: `best_of` is less than `n`.
        """
        if self.best_of is not None and self.best_of < n:
            raise InvalidRequest(f"best_of: {self.best_of} is less than n, {n}. Raise it, or omit it.", "best_of")
        return self.best_of or n

    def to_sampling_params(self, logprobs: int | None = None, n: int = 1) -> SamplingParams:
        """Return these fields, and `logprobs`, as `SamplingParams` of a request that returns `n` completions.

        Raises:
            InvalidRequest: there is more than one structured output, or `best_of` is less than `n`.
        """
        if logprobs is None and self.num_candidates(n) > n:
            logprobs = 0  # to rank them
        names = SamplingFields.model_fields.keys() - StructuredOutputFields.model_fields.keys() - {"best_of"}
        values = {name: getattr(self, name) for name in names}
        if self.top_k == -1:  # vLLM's value for "all"
            values["top_k"] = 0
        values["stop"] = tuple(self.stop)
        values["bad_words"] = tuple(self.bad_words)
        values["stop_token_ids"] = tuple(self.stop_token_ids)
        values["allowed_token_ids"] = tuple(self.allowed_token_ids or ())
        values["logit_bias"] = tuple((int(token_id), bias) for token_id, bias in self.logit_bias.items())
        return SamplingParams(**values, logprobs=logprobs, structured_output=self.structured_output())


def timeout_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the client's timeout from headers with names in lower case; None if not set.

    Raises:
        InvalidRequest: it is not a positive number.
    """
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"The header {TIMEOUT_HEADER} is not a positive number of seconds.", TIMEOUT_HEADER)
    return seconds
