"""Repetition, presence and frequency penalties of several rows, by token ids that stay on the device."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from predictor.engine.sampler import Row

MIN_CAPACITY = 256
"""Tokens of a sequence for which there is room at first."""


class _Slot(NamedTuple):
    """Place of a sequence's tokens."""

    number: int
    num_prompt: int
    """Tokens of the prompt that have a logit."""


class Penalties:
    """Penalties of the sequences of one model.

    Token ids of a prompt are copied to the device once. Sampled ones are never copied: `append` adds them there.
    """

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        """By request id."""
        self._tokens = torch.zeros(0, 0, dtype=torch.int32)
        """(slots, capacity), each row the tokens of a prompt and of the output so far."""
        self._longest = 0

    def plan(
        self, rows: Sequence[Row], running: Collection[str], vocabulary: int, device: torch.device
    ) -> dict[str, NDArray[np.generic]]:
        """Return the arrays of a step, which the other methods take as tensors on the device.

        Args:
            rows: at least one, whose samplers have penalties.
            running: request ids of sequences whose tokens are kept.
            vocabulary: number of tokens that have a logit.
            device: of the logits.
        """
        self._slots = {request_id: slot for request_id, slot in self._slots.items() if request_id in running}
        new = [self._add(row, vocabulary) for row in rows if row.state.request_id not in self._slots]
        slots = [self._slots[row.state.request_id] for row in rows]
        lengths = [slot.num_prompt + row.num_outputs for slot, row in zip(slots, rows, strict=True)]
        self._longest = max(lengths)
        self._reserve(1 + max(slot.number for slot in slots), 1 + self._longest, device)
        return {
            "new_tokens": np.concatenate([np.empty((3, 0), dtype=np.int64), *new], axis=1),
            "penalized": np.array([row.index for row in rows], dtype=np.int64),
            "places": np.array([*zip(*slots, strict=True), lengths], dtype=np.int64)[..., None],
            "penalties": np.array([row.sampler.penalties for row in rows], dtype=np.float32).T[..., None],
        }

    def _add(self, row: Row, vocabulary: int) -> NDArray[np.int64]:
        """Assign a slot, and return the slot, column and id of each of the sequence's tokens."""
        prompt, output = row.texts()
        # The embedding may have more rows than the LM head: those tokens can be in a prompt only.
        prompt = [token_id for token_id in prompt if token_id < vocabulary]
        used = {slot.number for slot in self._slots.values()}
        number = next(number for number in range(len(used) + 1) if number not in used)
        self._slots[row.state.request_id] = _Slot(number, len(prompt))
        token_ids = np.array([*prompt, *output], dtype=np.int64)
        return np.stack([np.full_like(token_ids, number), np.arange(len(token_ids)), token_ids])

    def _reserve(self, slots: int, capacity: int, device: torch.device) -> None:
        """Make room, at least twice as much if there is not enough."""
        old_slots, old_capacity = self._tokens.shape
        if slots > old_slots or capacity > old_capacity:
            slots = max(slots, old_slots if slots <= old_slots else 2 * old_slots)
            capacity = max(capacity, MIN_CAPACITY, old_capacity if capacity <= old_capacity else 2 * old_capacity)
            tokens = torch.zeros(slots, capacity, dtype=torch.int32, device=device)
            tokens[:old_slots, :old_capacity] = self._tokens
            self._tokens = tokens

    def apply(self, logits: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Lower the logits of tokens that occur already, in place, in contiguous logits (rows, LM head)."""
        new_slots, new_columns, token_ids = tensors["new_tokens"]
        self._tokens[new_slots, new_columns] = token_ids.int()
        slots, num_prompt, lengths = tensors["places"]
        repetition, presence, frequency = tensors["penalties"]
        places = self._tokens[slots[:, 0], : self._longest] + tensors["penalized"][:, None] * logits.shape[1]
        columns = torch.arange(self._longest, device=logits.device)
        # Columns that do not count get the last token, which does, so that all writes to a logit are the same.
        last = places.gather(1, (lengths - 1).clamp(min=0))
        flat = logits.view(-1)
        seen = torch.where(columns < lengths, places, last)
        values = flat[seen]
        penalized = torch.where(values > 0, values / repetition, values * repetition)
        flat[seen] = torch.where(lengths > 0, penalized, values)
        is_output = (columns >= num_prompt) & (columns < lengths)
        outputs = torch.where(is_output, places, last)
        flat[outputs] = flat[outputs] - presence * (lengths > num_prompt)
        flat.scatter_add_(0, outputs.flatten(), (-frequency * is_output).flatten())

    def append(self, token_ids: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add the sampled token of each row with penalties."""
        slots, _, lengths = tensors["places"][..., 0]
        self._tokens[slots, lengths] = token_ids.int()
