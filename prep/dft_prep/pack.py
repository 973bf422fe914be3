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
from dft_common.packs import PackIndexInfo
from dft_common.reader import list_lengths, open_stream
from dft_common.schema import PACK_SCHEMA

BLOCK_ROWS = 1 << 16
PACKER_VERSION = 1


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


def _cut(lengths: np.ndarray, first_row: int, options: PackOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, starts, ends) of the slices that these rows are cut into."""
    rows = np.arange(first_row, first_row + len(lengths), dtype=np.int64)
    limit = options.max_length
    if options.overlong == "split":
        counts = np.maximum(1, -(-lengths // limit))
        rows = np.repeat(rows, counts)
        ordinal = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = ordinal * limit
        return rows, starts, np.minimum(starts + limit, np.repeat(lengths, counts))
    if options.overlong == "drop":
        fitting = lengths <= limit
        rows, lengths = rows[fitting], lengths[fitting]
    return rows, np.zeros(len(rows), np.int64), np.minimum(lengths, limit)


class _Count:
    """What the index leaves out, for its report."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.truncated_rows = self.truncated_tokens = 0

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
        elif options.overlong == "truncate":
            self.truncated_rows += int(over.sum())
            self.truncated_tokens += int((lengths[over] - options.max_length).sum())


def _slices(batch: pa.RecordBatch, first_row: int, options: PackOptions, count: _Count) -> Slices:
    """The slices of one record batch that have something to train."""
    lengths = list_lengths(batch.column("input_ids"))
    count.overlong(lengths, first_row, options)
    rows, starts, ends = _cut(lengths, first_row, options)
    mask = batch.column("assistant_masks").values.to_numpy(zero_copy_only=False)
    running = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    base = np.concatenate([[0], np.cumsum(lengths)])[rows - first_row]
    # The first token of a slice is never a label: nothing in the slice comes before it.
    lives = running[base + ends] - running[np.minimum(base + starts + 1, base + ends)]
    alive = lives > 0
    whole_rows = np.setdiff1d(rows, rows[alive])
    if len(whole_rows):
        count.left_out["nothing_to_train_within_max_length"] += len(whole_rows)
    return Slices(rows=rows[alive], starts=starts[alive], ends=ends[alive], lives=lives[alive])


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
        truncated_rows=count.truncated_rows,
        truncated_tokens=count.truncated_tokens,
        bytes=len(data),
        checksum=hash_bytes(data),
    )
    packs_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(packs_dir / info.name, data)
    write_atomically(packs_dir / f"{name}.json", encode_json(info))
    return info
