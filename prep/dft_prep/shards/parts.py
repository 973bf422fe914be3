"""Parts: what finished work units leave in OUT/.work, to be sorted into shards when all are done.

Written by `work`, read by `assemble`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dft_common.reader import list_lengths, open_stream
from dft_common.schema import TokenDtype, row_schema
from dft_prep.shards.rows import Rows, token_columns, weight_array
from dft_prep.shards.split import KEY_DTYPE

_KEY = pa.binary(KEY_DTYPE.itemsize)


def part_schema(dtype: TokenDtype) -> pa.Schema:
    """Columns of a part: those of a row, but for its source and id, which the key and the work unit know."""
    kept = [field for field in row_schema(dtype) if field.name not in ("source", "id")]
    return pa.schema([*kept, pa.field("key", _KEY)])


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
            _KEY, len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows.keys).tobytes())]
        )
        columns = [*token_columns(rows, self.dtype), weight_array(rows), keys]
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
