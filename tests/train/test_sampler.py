"""Steps are a function of the index and the seeds; ranks and accumulation only deal them out."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_train.sampler import WINDOW_BLOCKS, Layout, StepSampler, epoch_order


def samplers(blocks, lives, per_device, accumulation, world_size, seed=7, epoch=0):
    made = []
    for rank in range(world_size):
        layout = Layout(per_device=per_device, accumulation=accumulation, world_size=world_size, rank=rank)
        sampler = StepSampler(blocks, lives, layout, index_seed=42, seed=seed)
        sampler.set_epoch(epoch)
        made.append(sampler)
    return made


@settings(max_examples=80, deadline=None)
@given(
    packs=st.integers(1, 60),
    per_device=st.integers(1, 3),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_layout_trains_the_same_packs_in_the_same_steps(packs, per_device, accumulation, world_size, epoch):
    blocks, lives = np.arange(packs) // 5, np.arange(packs) + 1
    batch = per_device * accumulation * world_size
    order = epoch_order(blocks, index_seed=42, seed=7, epoch=epoch)
    assert sorted(order) == list(range(packs))
    micro_batches = [list(s) for s in samplers(blocks, lives, per_device, accumulation, world_size, epoch=epoch)]
    steps = -(-packs // batch)
    for step in range(steps):
        expected = order[step * batch : (step + 1) * batch]
        mine = [micro_batches[r][step * accumulation + m][0] for r in range(world_size) for m in range(accumulation)]
        assert sorted(pack for micro in mine for pack in micro.packs) == sorted(expected)
        assert {micro.num_valid_tokens for micro in mine} == {int(lives[expected].sum())}
    # Every rank does as many micro-batches as the others: nobody waits for ever in a collective.
    assert {len(rank) for rank in micro_batches} == {steps * accumulation}


def test_packs_are_shuffled_within_a_window_of_blocks():
    blocks = np.repeat(np.arange(20), 10)
    order = epoch_order(blocks, index_seed=1, seed=2, epoch=0)
    window = WINDOW_BLOCKS * 10
    for start in range(0, len(order), window):
        assert len(set(blocks[order[start : start + window]])) == WINDOW_BLOCKS
    assert list(blocks[order[:10]]) != sorted(blocks[order[:10]])


def test_order_depends_on_epoch_and_on_both_seeds():
    blocks = np.arange(50) // 10
    orders = {
        tuple(epoch_order(blocks, index_seed=a, seed=b, epoch=c))
        for a, b, c in [(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1)]
    }
    assert len(orders) == 4
    assert tuple(epoch_order(blocks, index_seed=1, seed=1, epoch=0)) in orders


def test_evaluation_is_in_the_order_of_the_index():
    (sampler,) = samplers(np.arange(5), np.ones(5, int), 2, 1, 1, seed=None)
    assert [micro.packs for (micro,) in sampler] == [(0, 1), (2, 3), (4,)]
