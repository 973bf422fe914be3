"""A file -> work units: pieces small enough to balance over workers and to lose when a build is killed.

Called by `build`. Plain JSONL is cut into byte ranges; everything else (compressed files, JSON arrays, Parquet)
is one unit a file. Units do not depend on the number of workers, so that neither does the dataset.
"""

from __future__ import annotations

from typing import BinaryIO

import msgspec
import xxhash

from dft_common.fingerprint import HASH_CHUNK
from dft_prep.reconcile.reading import AS_FOUND, Reading
from dft_prep.sources.files import Compression, open_raw
from dft_prep.sources.named import SourceFile
from dft_prep.sources.sniff import Kind, sniff

UNIT_BYTES = 8 << 20
_LINE_PIECE = 1 << 16
"""Bytes of a line that are looked at in one go: a line may be larger than memory."""


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """A range of a file. Lines belong to the range in which they begin."""

    file: SourceFile
    source: str
    kind: Kind
    compression: Compression
    start: int
    end: int
    """-1: to the file's end."""
    reading: Reading = AS_FOUND
    notes: tuple[tuple[str, str], ...] = ()
    """(code, message) of what is odd about its file as a whole: in the first unit alone."""

    @property
    def size(self) -> int:
        """Bytes of the range, as they lie in the file."""
        return (self.end if self.end >= 0 else self.file.size) - self.start


def plan_units(file: SourceFile, source: str, reading: Reading = AS_FOUND) -> list[Unit]:
    """The work units of a file, in order. Raises FileError where the file holds no chat data."""
    compression, kind, notes = sniff(file)
    whole = kind is None or kind != "lines" or compression != "none"
    starts = [0] if whole else range(0, max(1, file.size), UNIT_BYTES)
    return [
        Unit(
            file=file,
            source=source,
            kind=kind or "lines",
            compression=compression,
            start=start,
            end=-1 if whole or start + UNIT_BYTES >= file.size else start + UNIT_BYTES,
            reading=reading,
            notes=notes if start == 0 else (),
        )
        for start in starts
    ]


def line_range(unit: Unit) -> tuple[int, int]:
    """Offsets of the first byte of the unit's first line, and of the byte behind its last (-1: the file's end)."""
    with open_raw(unit.file) as raw:
        first = _next_line(raw, unit.start, unit.end)
        # Where one line is longer than the unit, none begins in it.
        return first, first if first == unit.end else _next_line(raw, unit.end, -1)


def _next_line(raw: BinaryIO, position: int, end: int) -> int:
    """Offset of the first line that begins at `position` or behind; `end` where none does before (-1: the file's)."""
    if position <= 0:
        return position
    raw.seek(position - 1)
    while piece := raw.readline(_LINE_PIECE):
        if piece.endswith(b"\n"):
            return raw.tell()
        if 0 <= end <= raw.tell():
            return end
    return raw.tell()


def lines_before(unit: Unit) -> int:
    """How many lines of the file come before the unit's first."""
    if unit.kind != "lines" or unit.compression != "none" or unit.start == 0:
        return 0
    left, lines = line_range(unit)[0], 0
    with open_raw(unit.file) as raw:
        while left > 0 and (chunk := raw.read(min(left, HASH_CHUNK))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines


def unit_fingerprint(unit: Unit) -> str:
    """Hash of the unit's bytes: of its lines, or of the whole file as it lies there."""
    first, last = line_range(unit) if unit.kind == "lines" and unit.compression == "none" else (0, -1)
    state = xxhash.xxh3_128()
    with open_raw(unit.file) as raw:
        raw.seek(first)
        left = last - first if last >= 0 else None
        while left is None or left > 0:
            chunk = raw.read(HASH_CHUNK if left is None else min(left, HASH_CHUNK))
            if not chunk:
                break
            state.update(chunk)
            left = left if left is None else left - len(chunk)
    return state.hexdigest()
