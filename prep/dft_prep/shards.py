"""Write rows as Arrow stream files: the dataset's shards, and the parts that work units leave.

Called by `work` (parts) and `assemble` (shards). The same rows give the same bytes: batches are cut by row
count and tokens alone, and every array is built anew from plain buffers.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from dft_common.manifest import ShardInfo
from dft_common.reader import list_lengths, open_stream
from dft_common.schema import ROWS_PER_BATCH, TokenDtype, row_schema, shard_name
from dft_prep.split import KEY_DTYPE, row_id

_TOKENS_PER_BATCH = 1 << 24


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """Encoded conversations, flat."""

    input_ids: np.ndarray
    """[tokens], of the dataset's token dtype."""
    weights: np.ndarray
    """[tokens] float32: 0 where the token is context."""
    offsets: np.ndarray
    """[rows + 1] int64."""
    keys: np.ndarray
    """[rows] `KEY_DTYPE`."""

    def __len__(self) -> int:
        return len(self.keys)

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def part(self, start: int, end: int) -> Rows:
        """Rows [start, end)."""
        first, last = self.offsets[start], self.offsets[end]
        return Rows(
            input_ids=self.input_ids[first:last],
            weights=self.weights[first:last],
            offsets=self.offsets[start : end + 1] - first,
            keys=self.keys[start:end],
        )

    def select(self, chosen: np.ndarray) -> Rows:
        """The rows where `chosen` ([rows] bool) is True."""
        if chosen.all():
            return self
        tokens = np.repeat(chosen, self.lengths())
        lengths = self.lengths()[chosen]
        return Rows(
            input_ids=self.input_ids[tokens],
            weights=self.weights[tokens],
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            keys=self.keys[chosen],
        )


def concatenate(batches: Sequence[Rows]) -> Rows:
    lengths = np.concatenate([batch.lengths() for batch in batches])
    return Rows(
        input_ids=np.concatenate([batch.input_ids for batch in batches]),
        weights=np.concatenate([batch.weights for batch in batches]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        keys=np.concatenate([batch.keys for batch in batches]),
    )


class _HashingFile(io.RawIOBase):
    """A file that hashes and counts what is written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.hash = xxhash.xxh3_128()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # any buffer, as io.RawIOBase has it
        view = memoryview(data)
        self.hash.update(view)
        self.size += view.nbytes
        self._file.write(view)
        return view.nbytes

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()


def _list_array(offsets: np.ndarray, values: pa.Array, empty: np.ndarray | None = None) -> pa.Array:
    mask = pa.array(empty) if empty is not None and empty.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, mask=mask)


def _token_columns(rows: Rows, dtype: TokenDtype) -> list[pa.Array]:
    """`input_ids` and `assistant_masks`."""
    ids = pa.array(rows.input_ids.astype(dtype, copy=False))
    return [_list_array(rows.offsets, ids), _list_array(rows.offsets, pa.array(rows.weights > 0))]


def _weight_array(rows: Rows) -> pa.Array:
    """Weights of the rows that have one other than 0 and 1; null for all others."""
    unusual = (rows.weights != 0) & (rows.weights != 1)
    running = np.concatenate([[0], np.cumsum(unusual)])
    weighted = running[rows.offsets[1:]] > running[rows.offsets[:-1]]
    lengths = np.where(weighted, rows.lengths(), 0)
    values = rows.weights[np.repeat(weighted, rows.lengths())]
    return _list_array(np.concatenate([[0], np.cumsum(lengths)]), pa.array(values, pa.float32()), ~weighted)


def record_batch(rows: Rows, sources: Sequence[str], dtype: TokenDtype) -> pa.RecordBatch:
    """`rows` in the dataset's columns; sources: one name a row."""
    columns = [
        *_token_columns(rows, dtype),
        pa.array(sources, pa.string()),
        pa.array([row_id(content) for content in rows.keys["content"].tolist()], pa.string()),
        _weight_array(rows),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=row_schema(dtype))


class ShardWriter:
    """Writes one split's rows into shards of about `shard_bytes`. `finish` gives them their final names."""

    def __init__(self, directory: Path, dtype: TokenDtype, shard_bytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.shard_bytes = directory, shard_bytes
        self.dtype: TokenDtype = dtype
        self.longest = 0
        self._pending: list[tuple[Rows, str]] = []
        self._pending_rows = self._pending_tokens = 0
        self._done: list[ShardInfo] = []
        self._open()

    def _open(self) -> None:
        self._path = self.directory / f"shard-{len(self._done):05d}.tmp"
        self._file = _HashingFile(self._path)
        self._writer = pa.ipc.new_stream(pa.PythonFile(self._file, "w"), row_schema(self.dtype))
        self._rows = self._tokens = self._trained = 0

    def add(self, rows: Rows, source: str) -> None:
        """Append rows of one source. Batches are cut at the same rows however the rows come in."""
        start = 0
        while start < len(rows):
            room = ROWS_PER_BATCH - self._pending_rows
            ends = rows.offsets[start + 1 : start + room + 1] - rows.offsets[start] + self._pending_tokens
            fitting = max(1, int(np.searchsorted(ends, _TOKENS_PER_BATCH, side="right")))
            piece = rows.part(start, min(len(rows), start + min(room, fitting)))
            self._pending.append((piece, source))
            self._pending_rows += len(piece)
            self._pending_tokens += len(piece.input_ids)
            start += len(piece)
            if self._pending_rows >= ROWS_PER_BATCH or self._pending_tokens >= _TOKENS_PER_BATCH:
                self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._rows and self._file.size >= self.shard_bytes:
            self._close()
            self._open()
        rows = concatenate([piece for piece, _ in self._pending])
        sources = [source for piece, source in self._pending for _ in range(len(piece))]
        self._writer.write_batch(record_batch(rows, sources, self.dtype))
        self._rows += len(rows)
        self._tokens += len(rows.input_ids)
        self._trained += int(np.count_nonzero(rows.weights))
        self.longest = max(self.longest, int(rows.lengths().max()))
        self._pending.clear()
        self._pending_rows = self._pending_tokens = 0

    def _close(self) -> None:
        self._writer.close()
        self._file.close()
        self._done.append(
            ShardInfo(
                name=self._path.name,
                rows=self._rows,
                tokens=self._tokens,
                trained_tokens=self._trained,
                bytes=self._file.size,
                checksum=self._file.hash.hexdigest(),
            )
        )

    def finish(self) -> list[ShardInfo]:
        """Write what is left and rename every shard. An empty split is one shard without rows."""
        self._flush()
        self._close()
        final = []
        for number, shard in enumerate(self._done):
            name = shard_name(number, len(self._done))
            (self.directory / shard.name).replace(self.directory / name)
            final.append(msgspec.structs.replace(shard, name=name))
        return final


def part_schema(dtype: TokenDtype) -> pa.Schema:
    """Columns of a part: those of a row, but for its source and id, which the key and the work unit know."""
    kept = [field for field in row_schema(dtype) if field.name not in ("source", "id")]
    return pa.schema([*kept, pa.field("key", pa.binary(16))])


class PartWriter:
    """Writes the rows of one work unit, to a temporary name until `close`."""

    def __init__(self, path: Path, dtype: TokenDtype) -> None:
        self.dtype: TokenDtype = dtype
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._writer = pa.ipc.new_stream(self._file, part_schema(dtype))

    def add(self, rows: Rows) -> None:
        keys = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows.keys).tobytes())]
        )
        columns = [*_token_columns(rows, self.dtype), _weight_array(rows), keys]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=part_schema(self.dtype)))

    def close(self) -> None:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)

    def abandon(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _weights(masks: pa.ListArray, weights: pa.ListArray, offsets: np.ndarray) -> np.ndarray:
    """[tokens] float32: 1 where the mask is True, or the row's own weights where it has them."""
    out = masks.values.to_numpy(zero_copy_only=False).astype(np.float32)
    own = weights.values.to_numpy(zero_copy_only=False)
    own_offsets = weights.offsets.to_numpy()
    for row in np.flatnonzero(np.diff(own_offsets)).tolist():
        out[offsets[row] : offsets[row + 1]] = own[own_offsets[row] : own_offsets[row + 1]]
    return out


def read_part(path: Path) -> Iterator[Rows]:
    """The rows of a part, a batch at a time, through a memory map."""
    for batch in open_stream(path):
        ids, masks, weights, keys = batch.columns
        offsets = np.concatenate([[0], np.cumsum(list_lengths(ids))])
        yield Rows(
            input_ids=ids.values.to_numpy(),
            weights=_weights(masks, weights, offsets),
            offsets=offsets,
            keys=np.frombuffer(keys.buffers()[1], KEY_DTYPE, len(keys)),
        )


def read_part_keys(path: Path) -> np.ndarray:
    """[rows] KEY_DTYPE: the keys of a part's rows, without touching their tokens."""
    keys = [batch.column("key") for batch in open_stream(path)]
    return np.concatenate([np.zeros(0, KEY_DTYPE), *(np.frombuffer(k.buffers()[1], KEY_DTYPE, len(k)) for k in keys)])
