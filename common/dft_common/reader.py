"""Read a built dataset: rows by number through memory maps, batches in order, and the checks on what is on disk.

Used by the trainer (rows at random), and by `dft-prep verify`, `inspect` and `pack` (in order).
Depends on the format alone, never on the code that wrote it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from dft_common.errors import DataError
from dft_common.fingerprint import hash_file
from dft_common.manifest import Manifest, ShardInfo, read_manifest

_DAMAGED = "run `dft-prep verify` on the dataset to see everything that is wrong, then build it again"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One stored conversation, or a slice of it."""

    input_ids: np.ndarray
    """[tokens], the dataset's token dtype; a view of the memory map."""
    assistant_masks: np.ndarray
    """[tokens], bool: True where the token is trained."""
    source: str
    id: str
    loss_weights: np.ndarray | None
    """[tokens], float32, or None where every trained token counts 1."""


def open_stream(path: Path) -> list[pa.RecordBatch]:
    """The record batches of an Arrow stream file, memory-mapped: no data is read before it is used."""
    try:
        with pa.memory_map(str(path), "r") as source, pa.ipc.open_stream(source) as reader:
            return list(reader)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as an Arrow stream: {error}", remedy=_DAMAGED) from None


def check_shard_size(split_dir: Path, shard: ShardInfo) -> None:
    """Raise DataError where the shard is missing or has another size than the manifest says."""
    path = split_dir / shard.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: the shard is missing", remedy=_DAMAGED) from None
    if size != shard.bytes:
        raise DataError(f"{path}: {size:,} bytes on disk, {shard.bytes:,} in the manifest", remedy=_DAMAGED)


def check_shard_checksum(split_dir: Path, shard: ShardInfo) -> None:
    """Raise DataError where the shard's content is not what the manifest says."""
    check_shard_size(split_dir, shard)
    path = split_dir / shard.name
    found = hash_file(path)
    if found != shard.checksum:
        raise DataError(f"{path}: checksum {found}, the manifest says {shard.checksum}", remedy=_DAMAGED)


def _list_slice(column: pa.Array, index: int, start: int, end: int) -> np.ndarray:
    assert isinstance(column, pa.ListArray)
    first = column.offsets[index].as_py() + start
    return column.values.slice(first, end - start).to_numpy(zero_copy_only=False)


class SplitReader:
    """The rows of one split. Shards are opened, and their checksums verified, when first touched."""

    def __init__(self, dataset_dir: Path, split: str, manifest: Manifest | None = None, *, verify: bool = True) -> None:
        manifest = manifest or read_manifest(dataset_dir)
        if split not in manifest.splits:
            names = ", ".join(manifest.splits)
            raise DataError(f"{dataset_dir}: there is no split {split!r}", remedy=f"it has: {names}")
        self.info = manifest.splits[split]
        self.directory = dataset_dir / split
        self._verify = verify
        self._shard_ends = list(accumulate(shard.rows for shard in self.info.shards))
        self._opened: dict[int, tuple[list[pa.RecordBatch], list[int]]] = {}

    def __len__(self) -> int:
        return self.info.rows

    def check_sizes(self) -> None:
        """Raise DataError unless every shard has the size that the manifest says: cheap, so done at every start."""
        for shard in self.info.shards:
            check_shard_size(self.directory, shard)

    def _shard(self, index: int) -> tuple[list[pa.RecordBatch], list[int]]:
        if index not in self._opened:
            shard = self.info.shards[index]
            if self._verify:
                check_shard_checksum(self.directory, shard)
            batches = open_stream(self.directory / shard.name)
            self._opened[index] = batches, list(accumulate(batch.num_rows for batch in batches))
        return self._opened[index]

    def row(self, number: int, start: int = 0, end: int | None = None) -> Row:
        """Row `number`, or its tokens from `start` up to `end`."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        shard = bisect_right(self._shard_ends, number)
        batches, ends = self._shard(shard)
        number -= self._shard_ends[shard] - self.info.shards[shard].rows
        at = bisect_right(ends, number)
        batch = batches[at]
        number -= ends[at] - batch.num_rows
        ids, masks, source, identity, weights = batch.columns
        stop: int = end if end is not None else ids.offsets[number + 1].as_py() - ids.offsets[number].as_py()
        return Row(
            input_ids=_list_slice(ids, number, start, stop),
            assistant_masks=_list_slice(masks, number, start, stop),
            source=source[number].as_py(),
            id=identity[number].as_py(),
            loss_weights=_list_slice(weights, number, start, stop) if weights[number].is_valid else None,
        )

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Every record batch of the split, in order."""
        for index in range(len(self.info.shards)):
            yield from self._shard(index)[0]
            del self._opened[index]


def list_lengths(column: Any) -> np.ndarray:
    """[rows] int64: how many elements each list of an Arrow list column has (null counts 0)."""
    return np.diff(column.offsets.to_numpy()).astype(np.int64)
