"""The pack index: nothing lost, nothing twice, never too long, nearly full."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_common.errors import DataError
from dft_common.manifest import SplitInfo
from dft_common.packs import Lost, PackIndex, PackIndexInfo, Slice
from dft_prep.pipeline.report import describe_index
from dft_prep.shards import pack
from dft_prep.shards import writer as shards
from dft_prep.shards.pack import PackOptions, best_fit_decreasing, pack_split
from dft_prep.shards.rows import Rows
from dft_prep.shards.split import KEY_DTYPE
from dft_prep.shards.writer import ShardWriter

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


def write_split(directory, masks: list[list[bool]], sources: list[str] | None = None) -> SplitInfo:
    """A split whose row i has the mask `masks[i]` and is of `sources[i]`."""
    writer = ShardWriter(directory, "int32", 1 << 30)
    for mask, source in zip(masks, sources or ["s"] * len(masks), strict=True):
        rows = Rows(
            input_ids=np.arange(len(mask), dtype=np.int32),
            weights=np.array(mask, np.float32),
            offsets=np.array([0, len(mask)]),
            keys=np.zeros(1, KEY_DTYPE),
        )
        writer.add(rows, source)
    written = writer.finish()
    lengths = [len(mask) for mask in masks]
    trained = sum(sum(mask) for mask in masks)
    return SplitInfo(rows=len(masks), tokens=sum(lengths), trained_tokens=trained, longest=max(lengths), shards=written)


def row_of(*runs: int) -> list[bool]:
    """A mask of runs of these lengths, context and trained in turn, as turns and their replies are."""
    return [bool(number % 2) for number, length in enumerate(runs) for _ in range(length)]


def pack_rows(directory, masks, sources=None, **options) -> tuple[PackIndexInfo, list[Slice]]:
    split = write_split(directory / "train", masks, sources)
    info = pack_split(directory / "train", split, directory / "packs", PackOptions(**options), "f")
    index = PackIndex(directory, info)
    return info, [piece for number in range(len(index)) for piece in index[number]]


def labels(mask: list[bool], start: int, end: int) -> list[int]:
    """The places of the labels of a slice: its trained tokens but the first."""
    return [place for place in range(start + 1, end) if mask[place]]


def slow_cut(mask: list[bool], limit: int, overlong: str) -> list[tuple[int, int]]:
    """(start, end) of the slices of a row that have a label, token by token."""
    length = len(mask)
    turn_ends = [place + 1 for place in range(length) if mask[place] and not (place + 1 < length and mask[place + 1])]
    if length <= limit:
        cuts = [(0, length)]
    elif overlong == "drop":
        cuts = []
    elif overlong == "truncate":
        cuts = [(0, max((place + 1 for place in range(limit) if mask[place]), default=0))]
    else:
        cuts = []
        while not cuts or cuts[-1][1] < length:
            start = cuts[-1][1] if cuts else 0
            reached = [end for end in turn_ends if start < end <= start + limit]
            fits = length - start <= limit
            cuts.append((start, length if fits else max(reached, default=start + limit)))
    return [(start, end) for start, end in cuts if labels(mask, start, end)]


LIMIT = 8
MASKS = st.lists(
    st.lists(st.integers(0, 10), min_size=1, max_size=9).map(lambda runs: row_of(*runs)).filter(len),
    min_size=1,
    max_size=20,
)


@settings(max_examples=80)
@given(
    masks=MASKS,
    overlong=st.sampled_from(["truncate", "split", "drop"]),
    packing=st.booleans(),
    block=st.integers(1, 9),
    rows_of_a=st.integers(0, 20),
)
def test_the_index_is_what_cutting_row_by_row_gives(tmp_path_factory, masks, overlong, packing, block, rows_of_a):
    directory = tmp_path_factory.mktemp("split")
    sources = ["a" if row < rows_of_a else "b" for row in range(len(masks))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "BLOCK_ROWS", block)
        patch.setattr(shards, "ROWS_PER_BATCH", 3)
        info, slices = pack_rows(directory, masks, sources, max_length=LIMIT, overlong=overlong, packing=packing)
    expected = [
        Slice(row, start, end, len(labels(mask, start, end)))
        for row, mask in enumerate(masks)
        for start, end in slow_cut(mask, LIMIT, overlong)
    ]
    assert sorted(slices) == expected
    index = PackIndex(directory, info)
    assert info.slices == len(slices)
    assert (index.token_counts() <= LIMIT).all() and index.token_counts().sum() == info.tokens
    assert index.live_counts().sum() == info.live == sum(piece.live for piece in slices)
    assert (np.diff(index.blocks()) >= 0).all()
    if not packing:
        assert len(index) == len(slices)
        assert slices == expected
    for source in ("a", "b"):
        assert info.lost.get(source) == slow_lost(masks, slices, [s == source for s in sources])


def slow_lost(masks: list[list[bool]], slices: list[Slice], chosen: list[bool]) -> Lost | None:
    """What the `chosen` rows lose, row by row; None where that is nothing."""
    losses = []
    for row, mask in enumerate(masks):
        own = [(piece.start, piece.end) for piece in slices if piece.row == row]
        tokens = set(range(len(mask))) - {place for piece in own for place in range(*piece)}
        trained = set(labels(mask, 0, len(mask))) - {place for piece in own for place in labels(mask, *piece)}
        if chosen[row] and tokens | trained:
            losses.append((len(tokens), len(trained)))
    if not losses:
        return None
    return Lost(rows=len(losses), tokens=sum(t for t, _ in losses), trained_tokens=sum(t for _, t in losses))


@settings(max_examples=40)
@given(masks=MASKS, overlong=st.sampled_from(["truncate", "split", "drop"]))
def test_what_is_kept_and_what_is_lost_add_up_to_the_rows(tmp_path_factory, masks, overlong):
    directory = tmp_path_factory.mktemp("split")
    info, slices = pack_rows(directory, masks, max_length=LIMIT, overlong=overlong)
    lost = info.lost.get("s", Lost(rows=0, tokens=0, trained_tokens=0))
    assert info.tokens + lost.tokens == sum(len(mask) for mask in masks)
    assert info.live + lost.trained_tokens == sum(len(labels(mask, 0, len(mask))) for mask in masks)
    assert all(piece.end - piece.start <= LIMIT for piece in slices)


@settings(max_examples=40)
@given(masks=MASKS)
def test_a_truncated_row_keeps_its_start_and_ends_in_a_trained_token(tmp_path_factory, masks):
    _, slices = pack_rows(tmp_path_factory.mktemp("split"), masks, max_length=LIMIT, overlong="truncate")
    for piece in slices:
        mask = masks[piece.row]
        assert piece.start == 0
        if len(mask) <= LIMIT:
            assert piece.end == len(mask)
        else:
            assert mask[piece.end - 1] and not any(mask[piece.end : LIMIT])


@settings(max_examples=40)
@given(masks=MASKS)
def test_split_leaves_out_only_context_and_first_tokens_and_cuts_only_turns_that_are_too_long(tmp_path_factory, masks):
    _, slices = pack_rows(tmp_path_factory.mktemp("split"), masks, max_length=LIMIT, overlong="split")
    kept = {(piece.row, place) for piece in slices for place in labels(masks[piece.row], piece.start, piece.end)}
    for row, mask in enumerate(masks):
        turns = [0, *(at for at in range(1, len(mask)) if mask[at - 1] and not mask[at]), len(mask)]
        for start, end in pairwise(turns):
            # A turn with its context that would fit a slice is never cut, wherever the row's other cuts are.
            if end - start <= LIMIT:
                missing = [place for place in labels(mask, start, end) if (row, place) not in kept]
                assert not missing, (row, missing)


def test_where_split_cuts(tmp_path):
    rows = [
        row_of(2, 3, 2, 3, 2, 3, 1),  # one token of context is too much: the third turn's end is nearest
        row_of(2, 5, 2, 5, 2, 5),  # two turns fit, then the third
        row_of(2, 3, 2, 30, 2, 3),  # the long turn starts a slice of its own and is cut at the limit
        row_of(20, 5, 2, 3),  # context alone fills the first slice: it is left out
        row_of(2, 9, 2, 9, 4),  # the rest fits exactly: it is taken whole
    ]
    _, slices = pack_rows(tmp_path, rows, max_length=15, overlong="split")
    assert sorted(tuple(piece) for piece in slices) == [
        (0, 0, 15, 9),
        (1, 0, 14, 10),
        (1, 14, 21, 5),
        (2, 0, 5, 3),
        (2, 5, 20, 13),
        (2, 20, 35, 14),
        (2, 35, 42, 4),
        (3, 15, 30, 8),
        (4, 0, 11, 9),
        (4, 11, 26, 9),
    ]


def test_where_truncate_cuts(tmp_path):
    rows = [
        row_of(2, 5, 2, 5),  # at the limit, inside the second reply
        row_of(2, 5, 3, 2),  # the same, and one token of the reply is enough
        row_of(2, 5, 4, 1),  # only the second turn's context is within the limit: it goes
        row_of(12, 3),  # no reply within the limit
        row_of(0, 1, 12, 3),  # the only one is the slice's first token
        row_of(2, 5, 3),  # fits: its end stays
    ]
    info, slices = pack_rows(tmp_path, rows, ["a", "a", "a", "b", "b", "c"], max_length=11, overlong="truncate")
    assert sorted(tuple(piece) for piece in slices) == [(0, 0, 11, 7), (1, 0, 11, 6), (2, 0, 7, 5), (5, 0, 10, 5)]
    assert info.left_out == {"nothing_to_train_within_max_length": 2}
    assert info.lost == {
        "a": Lost(rows=3, tokens=9, trained_tokens=5),
        "b": Lost(rows=2, tokens=31, trained_tokens=6),
    }


def test_the_index_is_described_with_what_each_source_loses(tmp_path):
    info, _ = pack_rows(tmp_path, [row_of(2, 5), row_of(2, 1700)], ["fits", "long"], max_length=10)
    assert describe_index(info).splitlines() == [
        "2 packs of 10 (85.0 % full)",
        "    lost of long: tokens 1,692, trained tokens 1,692 (in 1 conversations)",
    ]


def test_overlong_error_names_the_row(tmp_path):
    split = write_split(tmp_path / "train", [row_of(3, 2), row_of(28, 2), row_of(4, 2)])
    with pytest.raises(DataError, match="row 1 has 30 tokens"):
        pack_split(tmp_path / "train", split, tmp_path / "packs", PackOptions(max_length=16, overlong="error"), "f")


def test_other_options_make_another_file_and_the_same_ones_the_same_bytes(tmp_path):
    split = write_split(tmp_path / "train", [row_of(3, 2), row_of(7, 2), row_of(4, 2)])
    make = lambda **options: pack_split(tmp_path / "train", split, tmp_path / "packs", PackOptions(**options), "f")  # noqa: E731
    assert make(max_length=16) == make(max_length=16)
    assert len({make(max_length=16).name, make(max_length=17).name, make(max_length=16, seed=1).name}) == 3


def test_packs_are_nearly_full():
    lengths = np.minimum(8192, np.exp(np.random.default_rng(0).normal(6, 1, 20_000)).astype(np.int64) + 2)
    bins = best_fit_decreasing(lengths, 8192)
    assert lengths.sum() / (8192 * len(bins)) > 0.995
