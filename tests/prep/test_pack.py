"""The pack index: nothing lost, nothing twice, never too long, nearly full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_common.errors import DataError
from dft_common.manifest import SplitInfo
from dft_common.packs import PackIndex
from dft_prep import pack
from dft_prep.pack import PackOptions, best_fit_decreasing, pack_split
from dft_prep.rows import Rows
from dft_prep.shards import ShardWriter
from dft_prep.split import KEY_DTYPE

CAPACITY = 64


@given(st.lists(st.integers(1, CAPACITY), max_size=200))
def test_every_item_is_in_just_one_bin_and_no_bin_overflows(lengths):
    sizes = np.array(lengths, np.int64)
    bins = best_fit_decreasing(sizes, CAPACITY)
    assert sorted(item for packed in bins for item in packed) == list(range(len(lengths)))
    assert all(sizes[packed].sum() <= CAPACITY for packed in bins)


def slow_best_fit(lengths: list[int]) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(CAPACITY - length)
    return len(rooms)


@given(st.lists(st.integers(1, CAPACITY), max_size=120))
def test_it_needs_as_many_bins_as_the_textbook_algorithm(lengths):
    assert len(best_fit_decreasing(np.array(lengths, np.int64), CAPACITY)) == slow_best_fit(lengths)


def write_split(directory, lengths: list[int], live: list[int]) -> SplitInfo:
    """A split whose row i has `lengths[i]` tokens, the last `live[i]` of them trained."""
    writer = ShardWriter(directory, "int32", 1 << 30)
    total = sum(lengths)
    weights = np.concatenate([np.arange(n) >= n - k for n, k in zip(lengths, live, strict=True)])
    rows = Rows(
        input_ids=np.arange(total, dtype=np.int32),
        weights=weights.astype(np.float32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        keys=np.zeros(len(lengths), KEY_DTYPE),
    )
    writer.add(rows, "s")
    shards = writer.finish()
    return SplitInfo(
        rows=len(lengths), tokens=total, trained_tokens=int(weights.sum()), longest=max(lengths), shards=shards
    )


ROWS = st.lists(st.tuples(st.integers(2, 40), st.integers(1, 40)), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(
    rows=ROWS, overlong=st.sampled_from(["truncate", "split", "drop"]), packing=st.booleans(), block=st.integers(1, 9)
)
def test_the_index_holds_every_live_label_within_reach(tmp_path_factory, rows, overlong, packing, block):
    directory = tmp_path_factory.mktemp("split") / "train"
    lengths = [length for length, _ in rows]
    live = [min(length, k) for length, k in rows]
    split = write_split(directory, lengths, live)
    limit = 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "BLOCK_ROWS", block)
        options = PackOptions(max_length=limit, overlong=overlong, packing=packing)
        info = pack_split(directory, split, directory.parent / "packs", options, "f")
    index = PackIndex(directory.parent, info)
    slices = [piece for number in range(len(index)) for piece in index[number]]
    expected = {}
    for row, (length, k) in enumerate(zip(lengths, live, strict=True)):
        starts = range(0, length, limit) if overlong == "split" else [0]
        for start in starts:
            end = min(length, start + limit)
            labels = sum(1 for token in range(start + 1, end) if token >= length - k)
            if labels and not (overlong == "drop" and length > limit):
                expected[row, start] = (end, labels)
    assert {(piece.row, piece.start): (piece.end, piece.live) for piece in slices} == expected
    assert len(slices) == len(expected) == info.slices
    assert (index.token_counts() <= limit).all()
    assert index.live_counts().sum() == info.live == sum(labels for _, labels in expected.values())
    assert (np.diff(index.blocks()) >= 0).all()
    if not packing:
        assert len(index) == len(slices)


def test_overlong_error_names_the_row(tmp_path):
    split = write_split(tmp_path / "train", [5, 30, 6], [2, 2, 2])
    with pytest.raises(DataError, match="row 1 has 30 tokens"):
        pack_split(tmp_path / "train", split, tmp_path / "packs", PackOptions(max_length=16, overlong="error"), "f")


def test_other_options_make_another_file_and_the_same_ones_the_same_bytes(tmp_path):
    split = write_split(tmp_path / "train", [5, 9, 6], [2, 2, 2])
    make = lambda **options: pack_split(tmp_path / "train", split, tmp_path / "packs", PackOptions(**options), "f")  # noqa: E731
    assert make(max_length=16) == make(max_length=16)
    assert len({make(max_length=16).name, make(max_length=17).name, make(max_length=16, seed=1).name}) == 3


def test_packs_are_nearly_full():
    lengths = np.minimum(8192, np.exp(np.random.default_rng(0).normal(6, 1, 20_000)).astype(np.int64) + 2)
    bins = best_fit_decreasing(lengths, 8192)
    assert lengths.sum() / (8192 * len(bins)) > 0.995
