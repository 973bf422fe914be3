"""Which packs each rank computes, and when: a function of the pack index and two seeds alone.

Optimizer step s of an epoch takes packs [s*B, (s+1)*B) of the epoch's order, B the global batch. Ranks,
accumulation and micro-batches only decide who computes which, so every layout trains the same model, and
resuming is a number. Within a step, `deal` gives packs of like cost to the ranks at the same time, so that they
finish together. Used by `dataset` for both splits and by `plan`.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
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
    step_tokens: int = 0
    """Tokens of the whole optimizer step, trained or not."""


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


Deal = list[list[list[int]]]
"""`deal[micro][rank]`: places, in the step, of the packs that this rank computes in this micro-batch."""


def waiting_cost(dealt: Deal, costs: Sequence[float]) -> float:
    """Cost of a step in which every micro-batch lasts as long as its dearest rank (ZeRO-3 waits at each layer)."""
    return sum(max(sum(costs[place] for place in places) for places in ranks) for ranks in dealt)


def _sizes(packs: int, layout: Layout) -> list[list[int]]:
    """[micro][rank]: how many of a step's packs go there. No two differ by more than one, also in a short step."""
    ranks = range(layout.world_size)
    share, more = divmod(packs, layout.accumulation * layout.world_size)
    return [[share + (micro * len(ranks) + rank < more) for rank in ranks] for micro in range(layout.accumulation)]


def _groups(places: Sequence[int], costs: Sequence[float], sizes: Sequence[int]) -> list[list[int]]:
    """`places`, dearest first, in groups of `sizes`: each goes to the group that costs least and has room."""
    groups: list[list[int]] = [[] for _ in sizes]
    open_groups = [(0.0, number) for number, size in enumerate(sizes) if size]
    for place in places:
        cost, number = heapq.heappop(open_groups)
        groups[number].append(place)
        if len(groups[number]) < sizes[number]:
            heapq.heappush(open_groups, (cost + costs[place], number))
    return groups


def _by_cost(costs: Sequence[float], sizes: Sequence[Sequence[int]]) -> Deal:
    """Dearest packs first: neighbours in cost meet in a micro-batch, and the rank with least so far gets the most."""
    dearest = sorted(range(len(costs)), key=lambda place: (-costs[place], place))
    totals = [0.0] * len(sizes[0])
    dealt, start = [], 0
    for row in sizes:
        end = start + sum(row)
        priced = [(sum(costs[at] for at in group), sorted(group)) for group in _groups(dearest[start:end], costs, row)]
        priced.sort(key=lambda group: -group[0])
        ranks: list[list[int]] = [[] for _ in row]
        lightest = sorted(range(len(row)), key=lambda rank: (totals[rank], rank))
        for rank, (cost, group) in zip(lightest, priced, strict=True):
            ranks[rank] = group
            totals[rank] += cost
        dealt.append(ranks)
        start = end
    return dealt


def _in_turn(sizes: Sequence[Sequence[int]]) -> Deal:
    places = iter(range(sum(map(sum, sizes))))
    return [[[next(places) for _ in range(size)] for size in row] for row in sizes]


def deal(costs: Sequence[float], layout: Layout) -> Deal:
    """Who computes which of a step's packs, of which `costs` gives the cost in the step's order.

    Every place once. With one pack in a micro-batch no deal has a lower `waiting_cost`; with more, the better of a
    deal by cost and one in turn is taken.
    """
    sizes = _sizes(len(costs), layout)
    return min((_by_cost(costs, sizes), _in_turn(sizes)), key=lambda dealt: waiting_cost(dealt, costs))


class StepSampler(Sampler[list[MicroBatch]]):
    """The micro-batches of one rank, in order; `accumulation` of them in every step, on every rank.

    A batch sampler for torch's DataLoader: each batch is one MicroBatch. `costs` [packs] float64 is what each pack
    costs to compute, in any unit; on every rank the same to the bit.
    """

    def __init__(
        self,
        blocks: np.ndarray,
        lives: np.ndarray,
        layout: Layout,
        *,
        tokens: np.ndarray,
        costs: np.ndarray,
        index_seed: int,
        seed: int | None,
    ) -> None:
        self.layout = layout
        self._blocks = blocks
        self._lives = lives
        self._tokens = tokens
        self._costs = costs
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
            valid, tokens = int(self._lives[step].sum()), int(self._tokens[step].sum())
            for ranks in deal(self._costs[step].tolist(), layout):
                yield [MicroBatch(tuple(int(step[place]) for place in ranks[layout.rank]), valid, tokens)]
