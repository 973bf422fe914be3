"""From slices of rows to the tensors of one micro-batch: one flattened sequence, without padding.

Called by `dataset` for batches and by `probe` (through `sequence_inputs`) for its questions. Labels are made
here and not shifted: `head` does that, once. For two slices [a b c] and [d e]:

    input_ids     a b c d e        position_ids  0 1 2 0 1
    labels        . b c . e        (a dot is IGNORE_INDEX: a slice's first token is never a label)

No token attends across slices: transformers builds the block-causal mask of sdpa and eager, sliding windows
included, from positions that restart, and flash_attention_2 is told the borders (`cu_seq_lens`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dft_common.reader import Row
from dft_common.schema import IGNORE_INDEX

FLASH = "flash_attention_2"
EMPTY_TOKENS = 2
"""Length of the dummy sequence that stands for no packs at all; none of its labels is live."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch."""

    inputs: dict[str, Tensor | int]
    """What the model takes: input_ids and position_ids, [1, tokens] int64; for flash attention also its borders."""
    labels: Tensor
    """[1, tokens] int64, not shifted, IGNORE_INDEX where dead."""
    live: Tensor
    """[live] int64: the places of the live labels, found here, where that waits for no device."""
    loss_weights: Tensor | None
    """[1, tokens] float32, or None where every live label counts 1."""
    source_ids: Tensor
    """[1, tokens] int64: the number of each token's source, in the manifest's order."""
    num_valid_tokens: int
    """Of the whole optimizer step, over all ranks and micro-batches."""
    pack_tokens: tuple[int, ...]
    """Tokens of each pack, in order; they add up to `tokens`."""
    step_tokens: int
    """Of the whole optimizer step, trained or not."""
    packs: tuple[int, ...] = ()
    """Numbers of the packs; none in the dummy sequence."""

    @property
    def tokens(self) -> int:
        """Of the packs: 0 for the dummy sequence."""
        return sum(self.pack_tokens)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return dataclasses.replace(
            self,
            inputs={name: change(value) if isinstance(value, Tensor) else value for name, value in self.inputs.items()},
            labels=change(self.labels),
            live=change(self.live),
            loss_weights=None if self.loss_weights is None else change(self.loss_weights),
            source_ids=change(self.source_ids),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`. Nothing is cast: weights stay float32 whatever the model's precision."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader where there is a GPU."""
        return self._map(torch.Tensor.pin_memory)


def sequence_inputs(lengths: Sequence[int], input_ids: np.ndarray, attention: str) -> dict[str, Tensor | int]:
    """The model's inputs for consecutive sequences of `lengths` tokens, all in `input_ids` [tokens]."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    inputs: dict[str, Tensor | int] = {
        "input_ids": torch.from_numpy(input_ids.astype(np.int64))[None],
        "position_ids": torch.from_numpy(positions.astype(np.int64))[None],
    }
    if attention == FLASH:
        borders = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        inputs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return inputs


def slice_labels(row: Row) -> np.ndarray:
    """[tokens] int64: the ids where the token is trained with a weight above 0, IGNORE_INDEX elsewhere and at 0."""
    live = row.assistant_masks.astype(bool)
    if row.loss_weights is not None:
        live = live & (row.loss_weights > 0)
    labels = np.where(live, row.input_ids.astype(np.int64), IGNORE_INDEX)
    labels[:1] = IGNORE_INDEX
    return labels


def _weights(rows: Sequence[Row]) -> Tensor | None:
    if all(row.loss_weights is None for row in rows):
        return None
    ones = [np.ones(len(row.input_ids), np.float32) if row.loss_weights is None else row.loss_weights for row in rows]
    return torch.from_numpy(np.concatenate(ones).astype(np.float32))[None]


def _empty(num_valid_tokens: int, step_tokens: int, attention: str) -> Batch:
    zeros = torch.zeros((1, EMPTY_TOKENS), dtype=torch.int64)
    return Batch(
        inputs=sequence_inputs([EMPTY_TOKENS], np.zeros(EMPTY_TOKENS, np.int64), attention),
        labels=torch.full_like(zeros, IGNORE_INDEX),
        live=zeros[0, :0],
        loss_weights=None,
        source_ids=zeros,
        num_valid_tokens=num_valid_tokens,
        pack_tokens=(),
        step_tokens=step_tokens,
    )


def collate(
    rows: Sequence[Row],
    sources: Sequence[int],
    num_valid_tokens: int,
    attention: str,
    *,
    pack_tokens: Sequence[int] | None = None,
    step_tokens: int | None = None,
    packs: Sequence[int] = (),
) -> Batch:
    """One micro-batch of the slices `rows` (each with the number of its source in `sources`).

    `pack_tokens` of the packs that they are from, by default one; `step_tokens` by default those of the micro-batch.
    """
    lengths = [len(row.input_ids) for row in rows]
    whole = sum(lengths) if step_tokens is None else step_tokens
    if not rows:
        return _empty(num_valid_tokens, whole, attention)
    labels = np.concatenate([slice_labels(row) for row in rows])
    return Batch(
        inputs=sequence_inputs(lengths, np.concatenate([row.input_ids for row in rows]), attention),
        labels=torch.from_numpy(labels)[None],
        live=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
        loss_weights=_weights(rows),
        source_ids=torch.from_numpy(np.repeat(np.asarray(sources, np.int64), lengths))[None],
        num_valid_tokens=num_valid_tokens,
        pack_tokens=(sum(lengths),) if pack_tokens is None else tuple(pack_tokens),
        step_tokens=whole,
        packs=tuple(packs),
    )
