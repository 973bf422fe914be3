"""num_valid_tokens counts the whole optimizer step: no layout changes a step's loss or its gradient.

Each step is computed as the ranks would compute it, micro-batch by micro-batch through sampler, index, collator and
head, and added up. The oracle adds up single conversations (`oracle`): DFT is a sum over tokens, so the gradient of a
step is that of its conversations, divided by their trained tokens, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_common.manifest import read_manifest
from dft_train.data.dataset import PackedSplit, train_sampler
from dft_train.data.sampler import Layout
from dft_train.models.head import HeadTap, LossRequest
from train import handmade, oracle

ALPHA = 0.6
SEED = 11


class World(NamedTuple):
    """A model, its tap, packed and unpacked indexes of one dataset, and each conversation's undivided gradient."""

    net: Any
    tap: HeadTap
    splits: list[PackedSplit]
    losses: list[float]
    gradients: list[torch.Tensor]


def flat(gradients: dict[str, torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(g.reshape(-1).double() for g in gradients.values())])


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> World:
    """Conversations of very different lengths, weighted ones and one without a trained token among them."""
    folder = tmp_path_factory.mktemp("world")
    rows = handmade.conversations(tokenizer, 13, weighted=True)
    rows.append(handmade.chat(tokenizer, [("user", "say nothing")], "more"))
    rows.append(handmade.chat(tokenizer, [("user", "count"), ("assistant", "1 2 3 4 5 6 7 8 9 10 11 12")], "sums"))
    data = handmade.write_dataset(folder / "data", rows, rows[:1], max_length=80, shards=1)
    manifest = read_manifest(data)
    handmade.write_index(data, "train", rows, manifest.fingerprint, max_length=79, packing=False)
    splits = [PackedSplit(data, manifest, "train", length, "sdpa") for length in (80, 79)]
    assert max(len(row.ids) for row in rows) <= 79
    model = handmade.write_model(folder / "model", "qwen3", hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    exact = oracle.load(model)
    pairs = []
    for row in rows:
        loss, gradients = oracle.loss_and_gradients(exact, [row], ALPHA, 1.0)
        pairs.append((loss, flat(gradients).clone()))
    net = oracle.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    return World(net, HeadTap(net), splits, [loss for loss, _ in pairs], [gradient for _, gradient in pairs])


def computed(world: World, split: PackedSplit, layout: Layout, step: int) -> tuple[float, torch.Tensor]:
    """What all ranks of `layout` compute in `step`: the sum of the logged losses, and of the gradients."""
    world.net.zero_grad()
    total = 0.0
    for rank in range(layout.world_size):
        own = Layout(
            per_device=layout.per_device, accumulation=layout.accumulation, world_size=layout.world_size, rank=rank
        )
        micros = list(train_sampler(split, own, SEED))[step * own.accumulation :][: own.accumulation]
        assert len(micros) == own.accumulation
        for (micro,) in micros:
            batch = split[micro]
            request = LossRequest(batch.labels, batch.loss_weights, max(batch.num_valid_tokens, 1), "dft", ALPHA)
            loss, stats = world.tap.loss(world.net, batch.inputs, request)
            loss.backward()
            total += float(stats.loss_sum) / max(batch.num_valid_tokens, 1)
    return total, flat({name: weight.grad for name, weight in world.net.named_parameters()})


def expected(world: World, split: PackedSplit, global_batch: int, step: int) -> tuple[float, torch.Tensor]:
    order = train_sampler(split, Layout(per_device=global_batch, accumulation=1, world_size=1, rank=0), SEED).order(0)
    packs = order[step * global_batch :][:global_batch]
    slices = [piece for pack in packs for piece in split.index[int(pack)]]
    assert all(piece.start == 0 for piece in slices)
    count = max(sum(int(split.lives[pack]) for pack in packs), 1)
    gradient = torch.stack([world.gradients[piece.row] for piece in slices]).sum(0)
    return sum(world.losses[piece.row] for piece in slices) / count, gradient / count


@settings(max_examples=25)
@given(
    number=st.sampled_from([0, 1]),
    per_device=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 4),
    place=st.floats(0, 1),
)
def test_a_step_is_the_sum_of_its_conversations_whatever_the_layout(
    world, number, per_device, accumulation, world_size, place
):
    """Packed and unpacked; every step can be drawn, the short last one and ranks without a pack among them."""
    split = world.splits[number]
    layout = Layout(per_device=per_device, accumulation=accumulation, world_size=world_size, rank=0)
    step = round(place * (train_sampler(split, layout, SEED).steps_per_epoch - 1))
    loss, gradient = computed(world, split, layout, step)
    true_loss, true_gradient = expected(world, split, layout.global_batch, step)
    assert loss == pytest.approx(true_loss, rel=1e-5, abs=1e-9)
    torch.testing.assert_close(gradient, true_gradient, rtol=0, atol=1e-5 * float(true_gradient.abs().max()) + 1e-9)


@pytest.mark.parametrize("number", [0, 1], ids=["packed", "unpacked"])
def test_an_epoch_in_one_step_has_the_same_gradient_packed_and_unpacked(world, number):
    split = world.splits[number]
    for world_size, accumulation in ((1, 1), (2, 4)):
        per_device = -(-len(split) // (world_size * accumulation))
        layout = Layout(per_device=per_device, accumulation=accumulation, world_size=world_size, rank=0)
        loss, gradient = computed(world, split, layout, 0)
        count = sum(int(live) for live in split.lives)
        assert loss == pytest.approx(sum(world.losses) / count, rel=1e-5)
        true = torch.stack(world.gradients).sum(0) / count
        torch.testing.assert_close(gradient, true, rtol=0, atol=1e-5 * float(true.abs().max()))


def test_a_step_without_a_trained_token_is_a_connected_zero(tokenizer, world, tmp_path: Path):
    silent = [handmade.chat(tokenizer, [("user", "say nothing")], "more")] * 2
    data = handmade.write_dataset(tmp_path / "data", silent, silent[:1], packing=False, shards=1)
    split = PackedSplit(data, read_manifest(data), "train", 64, "sdpa")
    loss, gradient = computed(world, split, Layout(per_device=1, accumulation=2, world_size=2, rank=0), 0)
    assert loss == 0 and gradient.shape == world.gradients[0].shape and not gradient.any()
