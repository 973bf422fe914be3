"""Write rows as the dataset's shards: Arrow stream files that `datasets` memory-maps as they are.

Called by `assemble`. The same rows give the same bytes: batches are cut by row count and tokens alone.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from dft_common.manifest import ShardInfo
from dft_common.schema import ROWS_PER_BATCH, TokenDtype, row_schema, shard_name
from dft_prep.shards.rows import Rows, concatenate, record_batch

_TOKENS_PER_BATCH = 1 << 24


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
