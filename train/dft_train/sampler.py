"""Which packs each rank computes, and when: a function of the pack index and two seeds alone.

Optimizer step s of an epoch takes packs [s*B, (s+1)*B) of the epoch's order, B the global batch. Ranks,
accumulation and micro-batches only decide who computes which, so every layout trains the same model, and
resuming is a number. Used by `dataset` for both splits and by `plan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

WINDOW_BLOCKS = 4
"""Packs are shuffled within so many shuffled blocks: reading stays local on a network disk."""


class MicroBatch(NamedTuple):
    """What one rank computes in one forward and backward pass."""

    packs: tuple[int, ...]
    """Numbers of packs; none where the epoch's last step has fewer packs than places."""
    num_valid_tokens: int
    """Trained labels of the whole optimizer step, over all ranks and micro-batches."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the packs of a step are dealt out."""

    per_device: int
    accumulation: int
    world_size: int
    rank: int

    @property
    def global_batch(self) -> int:
        return self.per_device * self.accumulation * self.world_size


def train_layout(args: Any) -> Layout:
    """From TrainingArguments."""
    return Layout(
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world_size=args.world_size,
        rank=args.process_index,
    )


def eval_layout(args: Any) -> Layout:
    """From TrainingArguments; an evaluation accumulates nothing."""
    per_device = args.per_device_eval_batch_size
    return Layout(per_device=per_device, accumulation=1, world_size=args.world_size, rank=args.process_index)


def epoch_order(blocks: np.ndarray, *, index_seed: int, seed: int, epoch: int) -> np.ndarray:
    """[packs] int64: the packs of one epoch in order. `blocks` [packs] is the block that each pack is from.

    Blocks are shuffled, then packs within a window of WINDOW_BLOCKS blocks.
    """
    random = np.random.default_rng([index_seed, seed, epoch])
    by_block = np.argsort(blocks, kind="stable")
    names, firsts = np.unique(blocks[by_block], return_index=True)
    groups = np.split(by_block, firsts[1:]) if len(names) else []
    shuffled = [groups[at] for at in random.permutation(len(groups))]
    order = []
    for start in range(0, len(shuffled), WINDOW_BLOCKS):
        order.append(random.permutation(np.concatenate(shuffled[start : start + WINDOW_BLOCKS])))
    return np.concatenate(order) if order else np.zeros(0, np.int64)


class StepSampler(Sampler[list[MicroBatch]]):
    """The micro-batches of one rank, in order; `accumulation` of them in every step, on every rank.

    A batch sampler for torch's DataLoader: each batch is one MicroBatch. Places in a step are dealt out micro-batch
    first, so that in a short last step no rank runs out long before the others.
    """

    def __init__(self, blocks: np.ndarray, lives: np.ndarray, layout: Layout, *, index_seed: int, seed: int | None):
        self.layout = layout
        self._blocks = blocks
        self._lives = lives
        self._seeds = (index_seed, seed)
        self._epoch = 0
        self._last_order: tuple[int, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """The packs of `epoch`: shuffled, or as they are where there is no seed (evaluation)."""
        index_seed, seed = self._seeds
        if self._last_order is None or self._last_order[0] != epoch:
            everything = np.arange(len(self._blocks))
            shuffled = seed is not None
            order = epoch_order(self._blocks, index_seed=index_seed, seed=seed, epoch=epoch) if shuffled else everything
            self._last_order = epoch, order
        return self._last_order[1]

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._blocks) // self.layout.global_batch)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.layout.accumulation

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        layout = self.layout
        order = self.order(self._epoch)
        for start in range(0, len(order), layout.global_batch):
            step = order[start : start + layout.global_batch]
            valid = int(self._lives[step].sum())
            for micro in range(layout.accumulation):
                first = (micro * layout.world_size + layout.rank) * layout.per_device
                packs = step[first : first + layout.per_device]
                yield [MicroBatch(tuple(int(pack) for pack in packs), valid)]
