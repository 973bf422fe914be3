"""Steps are a function of the index and the seeds; ranks and accumulation only deal them out."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_train.data.sampler import WINDOW_BLOCKS, Layout, StepSampler, deal, epoch_order, waiting_cost


def samplers(blocks, lives, per_device, accumulation, world_size, seed=7, epoch=0):
    made = []
    costs = np.random.default_rng(len(lives)).uniform(1, 9, len(lives)) if seed is not None else np.ones(len(lives))
    for rank in range(world_size):
        layout = Layout(per_device=per_device, accumulation=accumulation, world_size=world_size, rank=rank)
        sampler = StepSampler(blocks, lives, layout, tokens=lives, costs=costs, index_seed=42, seed=seed)
        sampler.set_epoch(epoch)
        made.append(sampler)
    return made


@settings(max_examples=80)
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


def in_turn(packs, layout):
    """The plain way: micro-batch after micro-batch, rank after rank, each as many as the most even split gives it."""
    share, more = divmod(packs, layout.accumulation * layout.world_size)
    dealt, start = [], 0
    for micro in range(layout.accumulation):
        dealt.append([])
        for rank in range(layout.world_size):
            size = share + (micro * layout.world_size + rank < more)
            dealt[-1].append(list(range(start, start + size)))
            start += size
    return dealt


@st.composite
def steps(draw):
    """(costs of a step's packs, layout): whole steps and short ones."""
    layout = Layout(
        per_device=draw(st.integers(1, 3)),
        accumulation=draw(st.integers(1, 5)),
        world_size=draw(st.integers(1, 6)),
        rank=0,
    )
    packs = draw(st.integers(1, layout.global_batch))
    return draw(st.lists(st.integers(0, 1000).map(float), min_size=packs, max_size=packs)), layout


@settings(max_examples=100)
@given(steps())
def test_a_deal_is_a_partition_of_the_step_and_no_rank_has_two_packs_more_than_another(step):
    costs, layout = step
    dealt = deal(costs, layout)
    assert [len(ranks) for ranks in dealt] == [layout.world_size] * layout.accumulation
    assert sorted(place for ranks in dealt for places in ranks for place in places) == list(range(len(costs)))
    sizes = [len(places) for ranks in dealt for places in ranks]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= layout.per_device
    by_rank = [sum(len(ranks[rank]) for ranks in dealt) for rank in range(layout.world_size)]
    assert max(by_rank) - min(by_rank) <= 1


@settings(max_examples=100)
@given(steps())
def test_ranks_never_wait_longer_than_if_packs_were_dealt_in_turn(step):
    costs, layout = step
    assert waiting_cost(deal(costs, layout), costs) <= waiting_cost(in_turn(len(costs), layout), costs)


@settings(max_examples=100)
@given(steps())
def test_with_one_pack_a_micro_batch_no_deal_waits_less(step):
    costs, layout = step
    layout = dataclasses.replace(layout, per_device=1)
    costs = costs[: layout.global_batch]
    dealt = deal(costs, layout)
    # The k-th dearest of all micro-batches cannot be cheaper than the pack behind the k * ranks dearest ones.
    assert waiting_cost(dealt, costs) == sum(sorted(costs, reverse=True)[:: layout.world_size])


@settings(max_examples=100)
@given(steps())
def test_totals_of_a_deal_by_cost_differ_by_one_micro_batch_at_most(step):
    costs, layout = step
    dealt = deal(costs, layout)
    prices = [[sum(costs[place] for place in places) for places in ranks] for ranks in dealt]
    totals = [sum(row[rank] for row in prices) for rank in range(layout.world_size)]
    spread = max(max(row) - min(row) for row in prices)
    assert max(totals) - min(totals) <= spread or dealt == in_turn(len(costs), layout)


def test_long_slices_meet_each_other():
    layout = Layout(per_device=1, accumulation=2, world_size=2, rank=0)
    dealt = deal([9.0, 1.0, 8.0, 2.0], layout)
    assert sorted(place for places in dealt[0] for place in places) == [0, 2]
    totals = [sum([9.0, 1.0, 8.0, 2.0][ranks[rank][0]] for ranks in dealt) for rank in range(2)]
    assert totals == [10.0, 10.0]
