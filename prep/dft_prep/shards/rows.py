"""Encoded conversations as flat arrays, and as the columns they are stored in.

Called by `work` (which makes them), `parts` and `shards` (which write them) and `assemble` (which sorts them out).
The same rows give the same bytes: every Arrow array is built anew from plain buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pyarrow as pa

from dft_common.schema import TokenDtype, row_schema
from dft_prep.shards.split import row_id


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


def list_array(offsets: np.ndarray, values: pa.Array, empty: np.ndarray | None = None) -> pa.Array:
    mask = pa.array(empty) if empty is not None and empty.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, mask=mask)


def token_columns(rows: Rows, dtype: TokenDtype) -> list[pa.Array]:
    """`input_ids` and `assistant_masks`."""
    ids = pa.array(rows.input_ids.astype(dtype, copy=False))
    return [list_array(rows.offsets, ids), list_array(rows.offsets, pa.array(rows.weights > 0))]


def weight_array(rows: Rows) -> pa.Array:
    """Weights of the rows that have one other than 0 and 1; null for all others."""
    unusual = (rows.weights != 0) & (rows.weights != 1)
    running = np.concatenate([[0], np.cumsum(unusual)])
    weighted = running[rows.offsets[1:]] > running[rows.offsets[:-1]]
    lengths = np.where(weighted, rows.lengths(), 0)
    values = rows.weights[np.repeat(weighted, rows.lengths())]
    return list_array(np.concatenate([[0], np.cumsum(lengths)]), pa.array(values, pa.float32()), ~weighted)


def record_batch(rows: Rows, sources: Sequence[str], dtype: TokenDtype) -> pa.RecordBatch:
    """`rows` in the dataset's columns; sources: one name a row."""
    columns = [
        *token_columns(rows, dtype),
        pa.array(sources, pa.string()),
        pa.array([row_id(content) for content in rows.keys["content"].tolist()], pa.string()),
        weight_array(rows),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=row_schema(dtype))
