"""Sample the next tokens of several sequences in one pass, by the same operations on every device.

Parameters are tensors with a row for each sequence, copied to the device at once, and no row waits for the device. What
depends on the text, such as a grammar, is computed on the host while the device runs the model.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from predictor.engine import noise
from predictor.engine.penalties import Penalties
from predictor.engine.sampler import Row, SequenceSampler, token_logprobs
from predictor.errors import RequestError

logger = logging.getLogger(__name__)

NUCLEUS_TOKENS = 1024
"""Number of most probable tokens sorted first for top_p without top_k; all are sorted if these are not enough."""

BLOCK_TOKENS = 128
"""Tokens that are sampled first as one: noise for each token of a vocabulary takes longer than all other work."""

BATCH_ROWS = 64
"""Rows sampled at a time, which limits the memory for their probabilities."""

_ALIGNMENT = 8
_BIAS_OF_OCTET = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32(0),
    -np.float32(np.inf),
)
"""Bias of the eight tokens of each octet of a mask, (256, 8)."""

Arrays = dict[str, NDArray[np.generic]]
Tensors = Mapping[str, torch.Tensor]


class BatchSampler:
    """Samples from the logits of steps, all on one device."""

    def __init__(self) -> None:
        self._penalties = Penalties()

    def __call__(self, logits: torch.Tensor, rows: Sequence[Row], vocabulary: int, running: Collection[str]) -> None:
        """Make the sampled token's logit the largest of each row, in place, and append log probabilities to samplers.

        An error of one sequence becomes the failure of its sampler.

        Args:
            logits: float32, contiguous, (sequences of the step, LM head).
            rows: those of samplers that are used.
            vocabulary: number of tokens that may be sampled; the logits of others are minus infinity.
            running: request ids of all sequences that have a sampler.
        """
        if logits.device.type == "mps":
            # It has no float64, in which the noise is.
            on_host = logits.cpu()
            self(on_host, rows, vocabulary, running)
            logits.copy_(on_host)
            return
        width = logits.shape[1]
        arrays, rows = _plan_exclusions(rows, vocabulary, width)
        reported = [row for row in rows if row.sampler.num_logprobs is not None]
        penalized = [row for row in rows if row.sampler.has_penalties]
        sampled = [row for row in rows if not row.sampler.is_greedy]
        arrays |= _plan_bias(rows, vocabulary, width) | _plan_sampling(sampled) | {"reported": _indices(reported)}
        if penalized:
            arrays |= self._penalties.plan(penalized, running, vocabulary, logits.device)
        tensors = _copied_to(logits.device, arrays)

        logprobs = logits[tensors["reported"]].log_softmax(dim=-1) if reported else None
        flat = logits.view(-1)
        flat.scatter_add_(0, tensors["bias_places"], tensors["bias"])
        if penalized:
            self._penalties.apply(logits, tensors)
        flat.index_fill_(0, tensors["excluded"], -torch.inf)
        _add_masks(logits, tensors["masked"], tensors["masks"])
        if sampled:
            token_ids = _sample_rows(logits, sampled, tensors)
            flat.index_fill_(0, tensors["sampled"] * width + token_ids, torch.inf)
        if penalized:
            self._penalties.append(_largest(logits, penalized, tensors["penalized"]), tensors)
        if logprobs is not None:
            token_ids = _largest(logits, reported, tensors["reported"])
            tops = [row.sampler.num_logprobs or 0 for row in reported]
            for row, logprob in zip(reported, token_logprobs(logprobs, token_ids.tolist(), tops), strict=True):
                row.sampler.logprobs.append(logprob)


def _indices(rows: Sequence[Row]) -> NDArray[np.int64]:
    return np.array([row.index for row in rows], dtype=np.int64)


def _is_batched(device: torch.device) -> bool:
    """Return whether rows are processed together. On a CPU one at a time is faster: it fits into the cache."""
    return bool(device.type != "cpu")


def _plan_exclusions(rows: Sequence[Row], vocabulary: int, width: int) -> tuple[Arrays, list[Row]]:
    """Return the excluded logits, the masks with the indices of their rows, and the rows without those that failed."""
    excluded, masked, masks, remaining = [np.empty(0, dtype=np.int64)], [], [], []
    for row in rows:
        texts = row.texts() if row.sampler.needs_host_tokens else ()
        # An error raised here would fail every other sequence of the step.
        try:
            token_ids, mask = row.sampler.exclusions(vocabulary, row.num_outputs, *texts)
        except RequestError as error:
            row.sampler.failure = error
            continue
        except BaseException as error:
            logger.exception("sampling failed for one sequence")
            row.sampler.failure = error
            continue
        remaining.append(row)
        excluded.append(token_ids + row.index * width)
        if mask is not None:
            masked.append(row)
            masks.append(mask)
    octets = np.stack(masks) if masks else np.empty((0, 0), dtype=np.uint8)
    return {"excluded": np.concatenate(excluded), "masked": _indices(masked), "masks": octets}, remaining


def _plan_bias(rows: Sequence[Row], vocabulary: int, width: int) -> Arrays:
    bias = {
        row.index * width + token_id: number
        for row in rows
        for token_id, number in row.sampler.logit_bias.items()
        if token_id < vocabulary
    }
    return {
        "bias_places": np.array(list(bias), dtype=np.int64),
        "bias": np.array(list(bias.values()), dtype=np.float32),
    }


def _plan_sampling(rows: Sequence[Row]) -> Arrays:
    integers = [(row.sampler.seed, row.position, row.sampler.top_k) for row in rows]
    limits = [(row.sampler.temperature, row.sampler.top_p, row.sampler.min_p) for row in rows]
    return {
        "sampled": _indices(rows),
        "integers": np.array(integers, dtype=np.int64).reshape(-1, 3),
        "limits": np.array(limits, dtype=np.float32).reshape(-1, 3),
    }


def _copied_to(device: torch.device, arrays: Arrays) -> dict[str, torch.Tensor]:
    """Return the arrays as tensors on a device, copied at once."""
    ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays.values()]).tolist()
    buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for begin, array in zip([0, *ends], arrays.values(), strict=False):
        buffer[begin : begin + array.nbytes] = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    copied = buffer.to(device, non_blocking=True)
    return {
        name: copied[begin : begin + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for begin, (name, array) in zip([0, *ends], arrays.items(), strict=False)
    }


def _add_masks(logits: torch.Tensor, rows: torch.Tensor, octets: torch.Tensor) -> None:
    """Set the logits of tokens without a bit in the mask of their row to minus infinity; octets are (rows, octets)."""
    if not len(rows):
        return
    tokens = min(8 * octets.shape[1], logits.shape[1])
    if _is_batched(logits.device):
        bias = _bias_of_octet(logits.device)[octets.int()].flatten(1)
        logits[:, :tokens].index_add_(0, rows, bias[:, :tokens])
        return
    # By far the fastest way on a CPU.
    bias = np.empty((octets.shape[1], 8), dtype=np.float32)
    for row, mask in zip(rows.tolist(), octets.numpy(), strict=True):
        np.take(_BIAS_OF_OCTET, mask, axis=0, out=bias, mode="clip")
        logits[row, :tokens] += torch.from_numpy(bias).view(-1)[:tokens]


@cache
def _bias_of_octet(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(_BIAS_OF_OCTET).to(device)


class Parameters(NamedTuple):
    """Of each row, (rows, 1)."""

    keys: torch.Tensor
    """Of the noise."""
    top_k: torch.Tensor
    """Number of most probable tokens to sample from; 0 is all."""
    temperature: torch.Tensor
    """At least GREEDY_BELOW."""
    top_p: torch.Tensor
    """Of those tokens, the fewest that together have this probability, 0 < top_p <= 1."""
    min_p: torch.Tensor
    """Of those, the ones with at least this fraction of the largest probability, 0 <= min_p <= 1."""


class Truncation(NamedTuple):
    """How many tokens of each row have to be sorted."""

    candidates: int
    """0: no row has a limit."""
    may_need_all: bool
    """Whether more may turn out to be needed."""


def truncation(samplers: Iterable[SequenceSampler], vocabulary: int) -> Truncation:
    """Return what the samplers need."""
    candidates, may_need_all = 0, False
    for sampler in samplers:
        nucleus = NUCLEUS_TOKENS if sampler.top_p < 1 else 0
        candidates = max(candidates, sampler.top_k or nucleus or (1 if sampler.min_p else 0))
        may_need_all |= bool(nucleus and not sampler.top_k)
    return Truncation(min(candidates, vocabulary), may_need_all and candidates < vocabulary)


def _sample_rows(logits: torch.Tensor, rows: Sequence[Row], tensors: Tensors) -> torch.Tensor:
    """Return a token id for each of the rows."""
    seeds, positions, top_k = tensors["integers"].split(1, dim=1)
    parameters = Parameters(noise.keys(seeds, positions), top_k, *tensors["limits"].split(1, dim=1))
    is_batched = _is_batched(logits.device)
    size = BATCH_ROWS if is_batched else 1
    token_ids = []
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        # The row of a CPU is not copied.
        index = rows[begin].index
        chosen = logits[tensors["sampled"][part]] if is_batched else logits[index : index + 1]
        needs = truncation([row.sampler for row in rows[part]], logits.shape[1])
        token_ids.append(sample(chosen, Parameters(*(column[part] for column in parameters)), needs))
    return torch.cat(token_ids)


def sample(logits: torch.Tensor, parameters: Parameters, needs: Truncation) -> torch.Tensor:
    """Return a token id for each row.

    Tokens with the same logit are kept or excluded together, so the result does not depend on the order in which a
    device sorts them.

    Args:
        logits: float32, (rows, vocabulary).
        parameters: of each row.
        needs: what `truncation` returns for these rows.
    """
    probabilities = (logits / parameters.temperature).softmax(dim=-1)
    if padding := -probabilities.shape[1] % BLOCK_TOKENS:
        probabilities = functional.pad(probabilities, (0, padding))
    blocks = probabilities.unflatten(1, (-1, BLOCK_TOKENS))
    if needs.candidates:
        _exclude_below(blocks, _least_probability(blocks, parameters, needs))
    # A race of exponentials: the largest of probability / noise is a sample. First between blocks of tokens, then
    # between the tokens of the first one's block. Token ids are not negative.
    numbers = -1 - torch.arange(blocks.shape[1], device=logits.device)
    block = (blocks.sum(dim=-1) / noise.exponential(parameters.keys, numbers)).argmax(dim=-1, keepdim=True)
    token_ids = block * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=logits.device)
    first = (_chosen(blocks, block) / noise.exponential(parameters.keys, token_ids)).argmax(dim=-1, keepdim=True)
    return token_ids.gather(1, first)[:, 0]


def _chosen(blocks: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the tokens of some blocks of each row, (rows, tokens); indices are (rows, blocks)."""
    return blocks.gather(1, indices[..., None].expand(-1, -1, BLOCK_TOKENS)).flatten(1)


def _largest(logits: torch.Tensor, rows: Sequence[Row], indices: torch.Tensor) -> torch.Tensor:
    """Return the token with the largest logit of each of the rows, which have these indices."""
    if _is_batched(logits.device):
        return logits[indices].argmax(dim=-1)
    # torch takes ten times as long.
    return torch.tensor([np.argmax(logits[row.index].numpy()) for row in rows])


def _sorted(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Return the largest probabilities of each row, in descending order, (rows, count)."""
    # As many blocks as tokens have them all: those with the largest maxima.
    is_few = 2 * count < blocks.shape[1]
    values = _chosen(blocks, blocks.amax(dim=-1).topk(count).indices) if is_few else blocks.flatten(1)
    if blocks.device.type != "cpu":
        return values.topk(count).values
    # torch takes ten times as long here, too.
    rest = values.shape[1] - count
    largest = np.partition(values.numpy(), rest, axis=1)[:, rest:]
    return torch.from_numpy(-np.sort(-largest, axis=1))


def _exclude_below(blocks: torch.Tensor, least: torch.Tensor) -> None:
    """Set probabilities below the least of their row to 0, in place."""
    if len(blocks) == 1 and blocks.device.type == "cpu":
        # A fifth of the time.
        functional.threshold(blocks, np.nextafter(least.numpy(), np.float32(0)).item(), 0.0, inplace=True)
    else:
        blocks.masked_fill_(blocks < least[..., None], 0.0)


def _least_probability(blocks: torch.Tensor, parameters: Parameters, needs: Truncation) -> torch.Tensor:
    """Return the smallest probability that each row keeps, (rows, 1)."""
    top_k, top_p = parameters.top_k, parameters.top_p
    if needs.candidates == 1:
        values = blocks.flatten(1).amax(dim=-1, keepdim=True)
    else:
        values = _sorted(blocks, needs.candidates)
    has_top_k, has_top_p = top_k > 0, top_p < 1
    is_candidate = ~has_top_k | (torch.arange(needs.candidates, device=values.device) < top_k)
    cumulative = (values * is_candidate).cumsum(dim=-1)
    if needs.may_need_all and bool((~has_top_k & has_top_p & (cumulative[:, -1:] < top_p)).any()):
        return _least_probability(blocks, parameters, Truncation(blocks[0].numel(), may_need_all=False))
    total = torch.where(has_top_k, cumulative[:, -1:], 1.0)
    is_kept = is_candidate & (~has_top_p | (cumulative - values < top_p * total))
    least = values.masked_fill(~is_kept, torch.inf).amin(dim=-1, keepdim=True)
    return torch.where(has_top_k | has_top_p, least, 0.0).maximum(parameters.min_p * values[:, :1])
