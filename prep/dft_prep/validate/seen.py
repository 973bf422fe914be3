"""Which conversations of a validation stand before, within and across files: exactly those that a build leaves out.

Filled by `validate.command` with what the workers hashed. Memory is bounded: beyond some size the hashes go to
temporary files, a bucket each, and each bucket is sorted on its own.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

SEEN_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("unit", "<u4"), ("line", "<u4"), ("byte_offset", "<i8")])
"""Of one record: its conversation's hash (`split.same_key`), and its place in its work unit."""

_BUCKETS = 64
_HELD_BYTES = 64 << 20


class Duplicate(NamedTuple):
    """A record whose conversation stands before. Both as rows of `SEEN_DTYPE`."""

    record: Any
    first: Any


def seen_rows(keys: Sequence[bytes], lines: array[int], offsets: array[int]) -> np.ndarray:
    """[records] SEEN_DTYPE, the unit left 0. keys: `same_key`; offsets: of the records' first bytes."""
    rows = np.zeros(len(keys), SEEN_DTYPE)
    hashes = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
    rows["high"], rows["low"] = hashes[:, 0], hashes[:, 1]
    rows["line"], rows["byte_offset"] = np.frombuffer(lines, np.int64), np.frombuffer(offsets, np.int64)
    return rows


class Seen:
    """The hashes of every good record."""

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []
        self._bytes = 0
        self._files: list[IO[bytes]] = []

    def add(self, rows: np.ndarray) -> None:
        """rows: [records] SEEN_DTYPE, in any order."""
        self._held.append(rows)
        self._bytes += rows.nbytes
        if self._bytes > _HELD_BYTES:
            self._spill()

    def _spill(self) -> None:
        self._files = self._files or [tempfile.TemporaryFile() for _ in range(_BUCKETS)]  # noqa: SIM115
        rows = np.concatenate([np.zeros(0, SEEN_DTYPE), *self._held])
        buckets = rows["low"] % np.uint64(_BUCKETS)
        rows = rows[np.argsort(buckets, kind="stable")]
        bounds = np.searchsorted(np.sort(buckets), np.arange(_BUCKETS + 1))
        for number, file in enumerate(self._files):
            file.write(rows[bounds[number] : bounds[number + 1]].tobytes())
        self._held, self._bytes = [], 0

    def count_and_first(self, most: int) -> tuple[int, list[Duplicate]]:
        """How many records are duplicates, and the first `most` of them in the order of units and lines."""
        count, found = 0, []
        for rows in self._buckets():
            repeated, first = _repeated(rows)
            count += len(repeated)
            found += [
                Duplicate(rows[at], rows[before]) for at, before in zip(repeated[:most], first[:most], strict=True)
            ]
            found.sort(key=lambda duplicate: (duplicate.record["unit"], duplicate.record["line"]))
            del found[most:]
        return count, found

    def _buckets(self) -> Iterator[np.ndarray]:
        if not self._files:
            yield np.concatenate([np.zeros(0, SEEN_DTYPE), *self._held])
            return
        self._spill()
        for file in self._files:
            file.seek(0)
            yield np.frombuffer(file.read(), SEEN_DTYPE)
            file.close()


def _repeated(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows that come again, the first of their kind), both as indices, the former in the order of units and lines."""
    order = np.lexsort((rows["byte_offset"], rows["line"], rows["unit"], rows["high"], rows["low"]))
    low, high = rows["low"][order], rows["high"][order]
    new = np.ones(len(rows), bool)
    new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
    repeated, first = order[~new], first[~new]
    by_place = np.lexsort((rows["line"][repeated], rows["unit"][repeated]))
    return repeated[by_place], first[by_place]
