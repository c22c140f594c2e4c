"""What a request may say of sampling and time; how its body is read, and how a wrong field is told.

Shared by the protocols, which differ in names and places of these fields, not in their ranges.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from predictor.errors import InvalidRequest
from predictor.types import SamplingParams

TIMEOUT_HEADER = "x-request-timeout-seconds"
"""The header, in lower case, by which a client allows less time than the server does."""

MAX_STOPS = 16
MAX_LOGPROBS = 20
"""OpenAI's bound on top_logprobs."""
MAX_COMPLETIONS = 128
"""OpenAI's bound on n."""


def _several(value: object) -> object:
    """One stop string as a list of one."""
    return [value] if isinstance(value, str) else value


def _scalar_list(value: object) -> object:
    """Parameters of v2 are scalars, so a list may also come as JSON in a string."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


Stop = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]],
    BeforeValidator(_several),
    BeforeValidator(_scalar_list),
    Field(max_length=MAX_STOPS),
]
"""One stop string, or several."""

StopTokenIds = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_scalar_list), Field(max_length=MAX_STOPS)]

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Sampling(BaseModel):
    """Sampling parameters under the names that vLLM and most servers use; unknown names are refused.

    Defaults are `SamplingParams`'s: None leaves the choice to the model's own generation config.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    max_tokens: int | None = Field(default=None, ge=1, description="New tokens at most.")
    min_tokens: int = Field(default=0, ge=0, description="New tokens before anything but max_tokens may end it.")
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="Cumulative probability kept.")
    top_k: int | None = Field(default=None, ge=-1, description="Most probable tokens kept; 0 and -1 keep all.")
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="1 is off.")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    stop: Stop = Field(default=[], description="Texts that end the completion and are not part of it.")
    stop_token_ids: StopTokenIds = Field(default=[], description="Tokens that end the completion.")
    ignore_eos: bool = Field(default=False, description="Go on after the model's end of sequence.")
    seed: Seed | None = Field(default=None, description="Makes sampling repeatable.")

    def sampling(self, logprobs: int | None = None) -> SamplingParams:
        """These fields as the engine takes them; `logprobs` as in `SamplingParams`."""
        values = {name: getattr(self, name) for name in Sampling.model_fields}
        if self.top_k == -1:  # as vLLM says it
            values["top_k"] = 0
        values["stop"] = tuple(self.stop)
        values["stop_token_ids"] = tuple(self.stop_token_ids)
        return SamplingParams(**values, logprobs=logprobs)


def timeout_seconds(headers: Mapping[str, str]) -> float | None:
    """What a client allows, by its headers (names in lower case); None if it says nothing.

    Raises:
        InvalidRequest: it is no positive number.
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
