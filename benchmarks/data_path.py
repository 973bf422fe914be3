"""Do the ranks of a step finish together, and does reading the next step's batches hide behind computing this one?

python benchmarks/data_path.py [--packs 20000] [--max_length 16384]

Dealing: cost of the steps if every micro-batch lasts as long as its dearest rank, over the cost if all ranks shared it
evenly (1.0: nobody waits), for packs of few long and of many short conversations and an 8-billion-parameter model.
Prefetch: seconds of a loop that reads a step and then leaves Python for as long as that took (a sleep: a device that
computes), over the seconds of those pauses alone (1.0: reading costs nothing; 2.0: all of it is waited for).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np

from dft_common.reader import Row
from dft_prep.shards.pack import best_fit_decreasing
from dft_train.data.collate import collate
from dft_train.data.flops import ModelWork, attended_pairs
from dft_train.data.prefetch import StepReader
from dft_train.data.sampler import Layout, deal, waiting_cost

WORK = ModelWork(per_token=6 * 7_500_000_000, per_live=6 * 128_256 * 4096, per_pair={None: 32 * 12 * 4096})
LAYOUT = Layout(per_device=1, accumulation=4, world_size=8, rank=0)
ACCUMULATION, STEPS = 4, 40


def _packs(count: int, max_length: int) -> list[np.ndarray]:
    """Lengths of the slices of each pack, in a shuffled order."""
    random = np.random.default_rng(0)
    lengths = np.minimum(max_length, np.exp(random.normal(7, 1.3, 12 * count)).astype(np.int64) + 2)
    packs = [lengths[rows] for rows in best_fit_decreasing(lengths, max_length)]
    return [packs[at] for at in random.permutation(len(packs))][:count]


def _deal(packs: list[np.ndarray]) -> None:
    random = np.random.default_rng(1)
    costs = []
    for lengths in packs:
        live = int(lengths.sum() * random.uniform(0.1, 0.9))
        pairs = int(attended_pairs(lengths, None).sum())
        costs.append(float(lengths.sum() * WORK.per_token + live * WORK.per_live + pairs * WORK.per_pair[None]))
    even = dealt = in_turn = 0.0
    for start in range(0, len(costs) - LAYOUT.global_batch, LAYOUT.global_batch):
        step = costs[start : start + LAYOUT.global_batch]
        even += sum(step) / LAYOUT.world_size
        dealt += waiting_cost(deal(step, LAYOUT), step)
        in_turn += sum(max(step[at : at + LAYOUT.world_size]) for at in range(0, len(step), LAYOUT.world_size))
    print(f"dealing: in turn {in_turn / even:.3f}, by cost {dealt / even:.3f} of an even share")


def _batches(packs: list[np.ndarray]) -> Iterator[object]:
    for lengths in packs:
        rows = [
            Row(
                input_ids=np.zeros(length, np.int32),
                assistant_masks=np.ones(length, bool),
                source="a",
                id="0",
                loss_weights=None,
            )
            for length in lengths
        ]
        yield collate(rows, [0] * len(rows), 1, "sdpa", pack_tokens=[int(lengths.sum())], step_tokens=1)


def _prefetch(packs: list[np.ndarray]) -> None:
    started = time.perf_counter()
    for _ in zip(range(STEPS * ACCUMULATION), _batches(packs), strict=False):
        pass
    pause = (time.perf_counter() - started) / STEPS
    source, reader = _batches(packs), StepReader()
    started = time.perf_counter()
    for _ in range(STEPS):
        reader.take(source, ACCUMULATION)
        time.sleep(pause)
    ahead = time.perf_counter() - started
    reader.close()
    started = time.perf_counter()
    for _ in range(STEPS):
        time.sleep(pause)
    alone = time.perf_counter() - started
    print(f"prefetch: {pause / ACCUMULATION * 1e3:.2f} ms a batch; the loop takes {ahead / alone:.2f} of its computing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=20_000)
    parser.add_argument("--max_length", type=int, default=16_384)
    arguments = parser.parse_args()
    packs = _packs(arguments.packs, arguments.max_length)
    _deal(packs)
    _prefetch(packs)


if __name__ == "__main__":
    main()
