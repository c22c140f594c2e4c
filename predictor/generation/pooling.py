"""Turn texts to embed or classify into token ids, and rows of the model into the response's."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from predictor.engine.pooling_engine import PoolingEngine
from predictor.engine.pooling_model import PoolingInput
from predictor.errors import DeadlineExceeded, InvalidRequest, PromptTooLong
from predictor.generation.token_ids import check as check_token_ids
from predictor.generation.tokenizer import TextTokenizer
from predictor.types import (
    CANCELLED,
    COMPUTED,
    DEADLINE,
    FAILED,
    WHOLE_CONTEXT,
    Caller,
    FinishedSequence,
    Pooling,
    PoolingRequest,
    Task,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUTES = {
    Task.GENERATE: "generates text. POST /v1/completions or /v1/chat/completions",
    Task.EMBED: "computes embeddings. POST /v1/embeddings",
    Task.CLASSIFY: "scores texts. POST /v1/rerank or /v1/score",
}
"""What a model does and how to request it, after its name."""


def num_characters(request: PoolingRequest) -> int:
    """Return the number of characters and token ids of all inputs."""
    parts = (input_ if _is_pair(input_) else (input_,) for input_ in request.inputs)
    return sum(len(part) for texts in parts for part in texts if not isinstance(part, int))


async def compute(
    engine: PoolingEngine,
    inputs: Sequence[PoolingInput],
    *,
    deadline: float,
    caller: Caller | None,
    on_finished: Callable[[FinishedSequence], None],
) -> "NDArray[numpy.float32]":
    """Return one row for each input; reports the request once, as one sequence, however it ends.

    Raises:
        RequestError: as of `PoolingEngine.compute`.
    """
    admitted = time.monotonic()
    outcome, queue_seconds = FAILED, None
    try:
        rows, queue_seconds = await engine.compute(inputs, deadline, caller)
        outcome = COMPUTED
    except DeadlineExceeded:
        outcome = DEADLINE
        raise
    except asyncio.CancelledError:
        outcome = CANCELLED
        raise
    finally:
        on_finished(
            FinishedSequence(
                index=0,
                outcome=outcome,
                prompt_tokens=sum(len(each.token_ids) for each in inputs),
                completion_tokens=0,
                admitted_at=admitted,
                total_seconds=time.monotonic() - admitted,
                queue_seconds=queue_seconds,
                first_token_seconds=None,
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class PoolingInputs:
    """Encodes requests for the engine.

    Args:
        tokenizer: the model's.
        pooling: of the snapshot.
        num_outputs: dimensions of an embedding, or labels of a classifier.
        context_tokens: maximum of tokens of one input.
        vocabulary_tokens: rows of the model's input embedding; token ids are below it.
        unembedded_tokens: by id, the tokenizer's tokens for which the model has no embedding.
    """

    tokenizer: TextTokenizer
    pooling: Pooling
    num_outputs: int
    context_tokens: int
    vocabulary_tokens: int
    unembedded_tokens: Mapping[int, str]

    def encode(self, request: PoolingRequest) -> list[PoolingInput]:
        """Return the tokens of each input.

        Raises:
            InvalidRequest: an option is not possible with this model, or an input is empty or has an unknown token.
            PromptTooLong: an input is too long, and not to be truncated.
        """
        if request.dimensions is not None and request.dimensions > self.num_outputs:
            raise InvalidRequest(
                f"dimensions is {request.dimensions}: embeddings of this model have {self.num_outputs}.", "dimensions"
            )
        if request.single_score and self.num_outputs != 1:
            raise InvalidRequest(
                f"This model has {self.num_outputs} labels, and one score for a pair needs exactly one. "
                "Use POST /v2/models/NAME/infer, whose output has the score of each label."
            )
        prompt = self._prompt(request)
        limit = self._limit(request.truncate_prompt_tokens)
        return [self._encode(input_, prompt, limit, index) for index, input_ in enumerate(request.inputs)]

    def finish(self, rows: "NDArray[numpy.float32]", request: PoolingRequest) -> "NDArray[numpy.float32]":
        """Return the rows with the requested number of dimensions; normalized again if they were."""
        if request.dimensions is None or request.dimensions == rows.shape[1]:
            return rows
        rows = rows[:, : request.dimensions]
        if not self.pooling.normalize:
            return rows
        lengths = numpy.linalg.norm(rows, axis=1, keepdims=True).clip(numpy.finfo(numpy.float32).tiny)
        normalized: NDArray[numpy.float32] = rows / lengths
        return normalized

    def _prompt(self, request: PoolingRequest) -> str:
        name = request.prompt_name or self.pooling.default_prompt_name
        if name is None:
            return ""
        if name not in self.pooling.prompts:
            known = ", ".join(self.pooling.prompts) or "none"
            raise InvalidRequest(f"prompt_name is {name!r}: the prompts of this model are {known}.", "prompt_name")
        if request.prompt_name and any(isinstance(input_, tuple) for input_ in request.inputs):
            raise InvalidRequest("prompt_name is for texts, not for token ids. Omit it.", "prompt_name")
        return self.pooling.prompts[name]

    def _limit(self, truncate_prompt_tokens: int | None) -> int | None:
        """Return the number of tokens to truncate inputs to; None: not at all."""
        if truncate_prompt_tokens is None:
            return None
        if truncate_prompt_tokens == WHOLE_CONTEXT:
            return self.context_tokens
        return min(truncate_prompt_tokens, self.context_tokens)

    def _encode(
        self, input_: str | tuple[int, ...] | tuple[str, str], prompt: str, limit: int | None, index: int
    ) -> PoolingInput:
        types = None
        if isinstance(input_, tuple) and not _is_pair(input_):
            token_ids = [int(token_id) for token_id in input_[:limit]]
        else:
            texts = (f"{prompt}{input_}",) if isinstance(input_, str) else input_
            encoded = self.tokenizer(*(text.lower() if self.pooling.lowercase else text for text in map(str, texts)))
            token_ids, types = encoded["input_ids"], encoded.get("token_type_ids")
            if limit is not None and len(token_ids) > limit and encoded.is_fast:
                kept = _kept_positions(encoded.sequence_ids(), limit)
                token_ids = [token_ids[position] for position in kept]
                types = types and [types[position] for position in kept]
        self._check(token_ids, index)
        return PoolingInput(token_ids, types)

    def _check(self, token_ids: Sequence[int], index: int) -> None:
        if not token_ids:
            raise InvalidRequest(f"Input {index} is empty. Send at least one character.")
        if len(token_ids) > self.context_tokens:
            raise PromptTooLong(
                f"Input {index} is too long: {len(token_ids)} tokens. The model takes {self.context_tokens}; shorten "
                "it, or set truncate_prompt_tokens to -1."
            )
        check_token_ids(token_ids, f"input {index}", self.vocabulary_tokens, self.unembedded_tokens)


def _kept_positions(sequence_ids: Sequence[int | None], limit: int) -> list[int]:
    """Return the positions of a text or pair truncated to `limit` tokens: special tokens stay, the longer text is cut.

    The tokenizer's own truncation would change its state, which threads share.

    Args:
        sequence_ids: 0 or 1, the text of each token; None for special tokens.
        limit: maximum number of tokens.
    """
    first, second = sequence_ids.count(0), sequence_ids.count(1)
    budget = max(0, limit - sequence_ids.count(None))
    kept_second = min(second, max(budget - first, (budget + (second >= first)) // 2))
    left = [min(first, budget - kept_second), kept_second]
    positions = []
    for position, text in enumerate(sequence_ids):
        if text is not None:
            left[text] -= 1
        if text is None or left[text] >= 0:
            positions.append(position)
    return positions


def _is_pair(input_: str | tuple[int, ...] | tuple[str, str]) -> bool:
    return isinstance(input_, tuple) and isinstance(input_[0], str)
