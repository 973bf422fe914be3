"""The pack index: which slices of which rows share a sequence. Another max_length or seed touches no token.

Called by `build` at its end and by `dft-prep pack`. Best-fit decreasing within blocks of 65,536 rows: within
0.02 % of packing everything at once (`benchmarks/packing.py`), while reading stays local and memory bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa

from dft_common.errors import DataError
from dft_common.fingerprint import hash_bytes, hash_object
from dft_common.manifest import SplitInfo, encode_json, write_atomically
from dft_common.packs import Lost, PackIndexInfo
from dft_common.reader import list_lengths, open_stream
from dft_common.schema import PACK_SCHEMA

BLOCK_ROWS = 1 << 16
PACKER_VERSION = 2


class PackOptions(msgspec.Struct, frozen=True, kw_only=True):
    max_length: int
    overlong: Literal["truncate", "split", "drop", "error"] = "truncate"
    packing: bool = True
    seed: int = 42

    def key(self, dataset_fingerprint: str) -> str:
        """Half of the index file's name: other options, or other rows, make another file."""
        return hash_object([msgspec.structs.asdict(self), dataset_fingerprint, PACKER_VERSION])[:12]


class Slices(msgspec.Struct, frozen=True, kw_only=True):
    """Slices of consecutive rows, as columns ([slices] each)."""

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lives: np.ndarray


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of item numbers, each with a total of at most `capacity`; every length is at most `capacity`.

    Longest first, each into the fullest bin that still holds it. The bins that have some room are a bit set,
    so that the fullest fitting one is the lowest bit above the length.
    """
    open_bins: dict[int, list[list[int]]] = {}
    rooms = 0
    bins: list[list[int]] = []
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            candidates = open_bins[room]
            chosen = candidates.pop()
            if not candidates:
                rooms ^= 1 << room
        else:
            room = capacity
            chosen = []
            bins.append(chosen)
        chosen.append(item)
        left = room - length
        if left:
            candidates = open_bins.setdefault(left, [])
            candidates.append(chosen)
            rooms |= 1 << left
    return bins


class _Batch(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one record batch, as places among its tokens: row i is tokens [starts[i], ends[i])."""

    starts: np.ndarray
    """[rows] int64."""
    ends: np.ndarray
    """[rows] int64."""
    mask: np.ndarray
    """[tokens] bool: True where the token is trained."""
    running: np.ndarray
    """[tokens + 1] int64: how many trained tokens come before each place."""

    def lengths(self) -> np.ndarray:
        """[rows] int64."""
        return self.ends - self.starts

    def labels(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """[slices] int64: trained labels of the slices [starts, ends).

        The first token of a slice is never a label: nothing in the slice comes before it.
        """
        return self.running[ends] - self.running[np.minimum(starts + 1, ends)]


def _batch(batch: pa.RecordBatch) -> _Batch:
    offsets = np.concatenate([[0], np.cumsum(list_lengths(batch.column("input_ids")))])
    mask = batch.column("assistant_masks").values.to_numpy(zero_copy_only=False)
    running = np.zeros(len(mask) + 1, np.int64)
    np.cumsum(mask, out=running[1:])
    return _Batch(starts=offsets[:-1], ends=offsets[1:], mask=mask, running=running)


def _truncated(batch: _Batch, starts: np.ndarray, limit: int) -> np.ndarray:
    """[starts] the ends of the overlong rows at `starts`: after the last trained token within `limit`.

    What follows it trains nothing, and would end the slice inside a header or an unanswered turn. A row without a
    trained token there ends where it starts.
    """
    # The first place with as many trained tokens before it as the limit has is the place after the last of them.
    ends = np.searchsorted(batch.running, batch.running[starts + limit])
    return np.maximum(ends, starts)


def _split(batch: _Batch, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers, starts, ends) of the slices of all rows, cut after the last turn within `limit` of where each starts.

    Only a turn that is longer than `limit` is cut inside, at the limit. With a limit of 8, `c` context, `T` trained
    and `|` the cuts: `ccTT|ccTTT|ccccTTTT|TT`. One round cuts one slice off every row that is not yet used up.
    """
    # Where a trained token comes before a context token. A turn at its row's end is none: the rest of a row is whole.
    turn_ends = np.concatenate([[0], np.flatnonzero(batch.mask[:-1] & ~batch.mask[1:]) + 1])
    numbers, starts = np.arange(len(batch.starts)), batch.starts
    rounds = []
    while len(numbers):
        limits, row_ends = starts + limit, batch.ends[numbers]
        turns = turn_ends[np.searchsorted(turn_ends, limits, side="right") - 1]
        ends = np.where(turns > starts, turns, limits)
        ends = np.where(row_ends <= limits, row_ends, ends)
        rounds.append((numbers, starts, ends))
        rest = ends < row_ends
        numbers, starts = numbers[rest], ends[rest]
    numbers, starts, ends = (np.concatenate(column) for column in zip(*rounds, strict=True))
    order = np.argsort(numbers, kind="stable")
    return numbers[order], starts[order], ends[order]


def _cut(batch: _Batch, options: PackOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row numbers, starts, ends) of the slices that the rows are cut into; a row within the limit is one, whole."""
    over = batch.lengths() > options.max_length
    if options.overlong == "split" and over.any():
        return _split(batch, options.max_length)
    numbers = np.arange(len(batch.starts))
    ends = batch.ends.copy()
    if options.overlong == "truncate" and over.any():
        ends[over] = _truncated(batch, batch.starts[over], options.max_length)
    if options.overlong == "drop":
        numbers = numbers[~over]
    return numbers, batch.starts[numbers], ends[numbers]


class _Count:
    """What the index leaves out, for its report."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.lost: dict[str, Lost] = {}

    def overlong(self, lengths: np.ndarray, first_row: int, options: PackOptions) -> None:
        over = lengths > options.max_length
        if not over.any():
            return
        if options.overlong == "error":
            row = first_row + int(np.flatnonzero(over)[0])
            raise DataError(
                f"row {row:,} has {int(lengths[over][0]):,} tokens, --max_length is {options.max_length:,} "
                "(--overlong error)",
                remedy="raise --max_length, or choose --overlong truncate, split or drop",
            )
        if options.overlong == "drop":
            self.left_out["overlong"] += int(over.sum())

    def losses(self, sources: pa.StringArray, tokens: np.ndarray, trained: np.ndarray) -> None:
        """Add what each row of a batch loses ([rows] each) to its source's."""
        losing = np.flatnonzero((tokens > 0) | (trained > 0))
        if not len(losing):
            return
        names = sources.take(pa.array(losing)).dictionary_encode()
        of = names.indices.to_numpy()
        for code, name in enumerate(names.dictionary.to_pylist()):
            rows = losing[of == code]
            before = self.lost.get(name, Lost(rows=0, tokens=0, trained_tokens=0))
            self.lost[name] = Lost(
                rows=before.rows + len(rows),
                tokens=before.tokens + int(tokens[rows].sum()),
                trained_tokens=before.trained_tokens + int(trained[rows].sum()),
            )


def _slices(record_batch: pa.RecordBatch, first_row: int, options: PackOptions, count: _Count) -> Slices:
    """The slices of one record batch that have something to train."""
    batch = _batch(record_batch)
    count.overlong(batch.lengths(), first_row, options)
    cut, starts, ends = _cut(batch, options)
    lives = batch.labels(starts, ends)
    alive = lives > 0
    numbers, starts, ends, lives = cut[alive], starts[alive], ends[alive], lives[alive]
    whole_rows = np.setdiff1d(cut, numbers)
    if len(whole_rows):
        count.left_out["nothing_to_train_within_max_length"] += len(whole_rows)

    def by_row(values: np.ndarray) -> np.ndarray:
        return np.bincount(numbers, values, minlength=len(batch.starts)).astype(np.int64)

    count.losses(
        record_batch.column("source"),
        tokens=batch.lengths() - by_row(ends - starts),
        trained=batch.labels(batch.starts, batch.ends) - by_row(lives),
    )
    base = batch.starts[numbers]
    return Slices(rows=numbers + first_row, starts=starts - base, ends=ends - base, lives=lives)


def _blocks(split_dir: Path, split: SplitInfo, options: PackOptions, count: _Count) -> Iterator[tuple[int, Slices]]:
    """(block number, its slices), a block of rows at a time."""
    pending: list[Slices] = []
    block = first_row = 0
    for shard in split.shards:
        for batch in open_stream(split_dir / shard.name):
            if pending and (first_row + batch.num_rows - 1) // BLOCK_ROWS > block:
                yield block, _merge(pending)
                pending, block = [], (first_row + batch.num_rows - 1) // BLOCK_ROWS
            pending.append(_slices(batch, first_row, options, count))
            first_row += batch.num_rows
    if pending:
        yield block, _merge(pending)


def _merge(parts: Sequence[Slices]) -> Slices:
    return Slices(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in Slices.__struct_fields__})


def _pack_batch(block: int, slices: Slices, options: PackOptions) -> pa.RecordBatch:
    if options.packing:
        bins = best_fit_decreasing(slices.ends - slices.starts, options.max_length)
        order = np.array([item for packed in bins for item in sorted(packed)], np.int64)
        counts = np.array([len(packed) for packed in bins], np.int64)
    else:
        order, counts = np.arange(len(slices.rows)), np.ones(len(slices.rows), np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))

    def column(values: np.ndarray, dtype: Any) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values[order].astype(dtype)))

    columns = [
        column(slices.rows, np.uint32),
        column(slices.starts, np.int32),
        column(slices.ends, np.int32),
        column(slices.lives, np.int32),
        pa.array(np.full(len(counts), block, np.int32)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=PACK_SCHEMA)


def pack_split(
    split_dir: Path, split: SplitInfo, packs_dir: Path, options: PackOptions, dataset_fingerprint: str
) -> PackIndexInfo:
    """Write the pack index of one split into `packs_dir` and return what is in it.

    Raises DataError for an overlong row under `--overlong error`.
    """
    count = _Count()
    sink = pa.BufferOutputStream()
    packs = slices = tokens = live = 0
    with pa.ipc.new_stream(sink, PACK_SCHEMA) as writer:
        for block, found in _blocks(split_dir, split, options, count):
            batch = _pack_batch(block, found, options)
            writer.write_batch(batch)
            packs += batch.num_rows
            slices += len(found.rows)
            tokens += int((found.ends - found.starts).sum())
            live += int(found.lives.sum())
    data = sink.getvalue().to_pybytes()
    name = f"{split_dir.name}-{options.max_length}-{options.key(dataset_fingerprint)}"
    info = PackIndexInfo(
        name=f"{name}.arrow",
        split=split_dir.name,
        **msgspec.structs.asdict(options),
        dataset_fingerprint=dataset_fingerprint,
        packs=packs,
        slices=slices,
        tokens=tokens,
        live=live,
        left_out=dict(count.left_out),
        lost=count.lost,
        bytes=len(data),
        checksum=hash_bytes(data),
    )
    packs_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(packs_dir / info.name, data)
    write_atomically(packs_dir / f"{name}.json", encode_json(info))
    return info
