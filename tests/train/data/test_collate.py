"""From slices to tensors."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_common.manifest import read_manifest
from dft_common.packs import PackIndex
from dft_common.reader import Row
from dft_train.data.collate import EMPTY_TOKENS, FLASH, collate
from dft_train.data.dataset import PackedSplit
from dft_train.data.sampler import MicroBatch
from dft_train.models.head import shift


def row(ids, mask, weights=None) -> Row:
    return Row(
        input_ids=np.array(ids, np.int32),
        assistant_masks=np.array(mask, bool),
        source="s",
        id="0",
        loss_weights=None if weights is None else np.array(weights, np.float32),
    )


def test_the_example_of_the_docstring():
    batch = collate([row([1, 2, 3], [1, 1, 1]), row([4, 5], [1, 1])], [0, 1], 3, "sdpa")
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, 5]]
    assert batch.source_ids.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.tokens == 5


def test_a_weight_of_zero_is_no_label_and_others_multiply():
    batch = collate([row([1, 2, 3], [1, 1, 1], [1, 0, 0.5]), row([4, 5], [1, 1])], [0, 0], 2, "sdpa")
    assert batch.labels.tolist() == [[-100, -100, 3, -100, 5]]
    assert batch.loss_weights.tolist() == [[1, 0, 0.5, 1, 1]]


def test_flash_attention_is_told_the_borders():
    batch = collate([row([1, 2, 3], [0, 0, 1]), row([4, 5], [0, 1])], [0, 0], 2, FLASH)
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch.inputs["cu_seq_lens_q"].dtype == torch.int32
    assert batch.inputs["max_length_k"] == 3


def test_no_packs_are_a_short_sequence_without_labels():
    batch = collate([], [], 9, "sdpa")
    assert batch.inputs["input_ids"].shape == (1, EMPTY_TOKENS)
    assert (batch.labels == -100).all() and batch.tokens == 0 and batch.num_valid_tokens == 9


def test_a_batch_knows_its_packs_and_its_step(dataset):
    split = PackedSplit(dataset, read_manifest(dataset), "train", 64, "sdpa")
    batch = split[MicroBatch((3, 0), 7, 500)]
    assert batch.pack_tokens == (split.tokens[3], split.tokens[0]) and batch.step_tokens == 500
    assert batch.tokens == sum(batch.pack_tokens) == batch.inputs["input_ids"].shape[1]
    empty = split[MicroBatch((), 7, 500)]
    assert empty.pack_tokens == () and empty.step_tokens == 500


@settings(max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5))
def test_no_label_crosses_a_border(masks):
    rows = [row([10 * at + k for k in range(len(mask))], mask) for at, mask in enumerate(masks)]
    batch = collate(rows, [0] * len(rows), 1, "sdpa")
    ids = batch.inputs["input_ids"].reshape(-1)
    shifted = shift(batch.labels, -100)
    for at, label in enumerate(shifted.tolist()):
        assert label == -100 or (label // 10 == int(ids[at]) // 10 and label == int(ids[at]) + 1)
    assert (shifted != -100).sum() == sum(sum(mask[1:]) for mask in masks)


def test_labels_of_the_dataset_are_as_many_as_its_index_says(dataset):
    split = PackedSplit(dataset, read_manifest(dataset), "train", 64, "sdpa")
    assert isinstance(split.index, PackIndex) and len(split) > 10
    for pack in range(len(split)):
        batch = split[MicroBatch((pack,), 0)]
        assert int((batch.labels != -100).sum()) == split.lives[pack]
        assert batch.tokens == split.tokens[pack] <= 64
