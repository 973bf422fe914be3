"""A work unit -> raw records: the bytes of one JSON text each, with their place. Nothing is parsed or inferred here.

Called by `work`, `build` (sample), `preview` and `validate_command`. Memory holds a record and a chunk, whatever the
file's size.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from dft_common.errors import DataError
from dft_prep.files import BOM, Truncated, decompressed, open_raw, read_some
from dft_prep.json_stream import Piece, split_values
from dft_prep.units import Unit, line_range

_CHUNK = 1 << 20
_PARQUET_ROWS = 1000


class RawRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One record as it stands in its file."""

    line: int
    """1-based; for ranges of lines counted from the range's start; for Parquet the row."""
    byte_offset: int
    """Of its first byte, in the decompressed file; -1 for Parquet."""
    data: bytes | dict[str, Any]
    cut: bool = False
    """The file ends inside it, or right behind it without a newline."""
    problem: tuple[str, str] | None = None
    """(code, message) of something wrong with the file at this place, rather than with a record."""


class FileNote(msgspec.Struct, frozen=True, kw_only=True):
    """Something odd about a file, which costs no record: a code of the scope `note`, at its first place in the unit."""

    code: str
    line: int
    """As in `RawRecord`."""
    byte_offset: int
    message: str


class UnitReader:
    """Iterates over the records of a unit. Blank lines are no records."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.lines = 0
        """Newlines passed so far: after the last record, all of the unit's."""
        self.notes: list[FileNote] = []
        """Complete when the last record was read; one a code."""

    def __iter__(self) -> Iterator[RawRecord]:
        if self.unit.kind == "parquet":
            return self._parquet()
        return self._lines() if self.unit.kind == "lines" else self._values()

    def _lines(self) -> Iterator[RawRecord]:
        unit = self.unit
        first, last = line_range(unit) if unit.compression == "none" else (0, -1)
        with open_raw(unit.file) as raw:
            raw.seek(first)
            stream = decompressed(raw, unit.compression)
            offset = first
            while last < 0 or offset < last:
                try:
                    line = stream.readline()
                except Truncated as error:
                    yield self._truncated(error, offset)
                    return
                if not line:
                    return
                ended = line.endswith(b"\n")
                start = len(BOM) if offset == 0 and line.startswith(BOM) else 0
                text = line[start:-1] if ended else line[start:]
                if text.strip():
                    yield RawRecord(line=self.lines + 1, byte_offset=offset + start, data=text, cut=not ended)
                self.lines += ended
                offset += len(line)

    def _values(self) -> Iterator[RawRecord]:
        with open_raw(self.unit.file) as raw:
            stream = decompressed(raw, self.unit.compression)
            chunks = _Chunks(stream)
            for piece in split_values(iter(chunks), "array" if self.unit.kind == "array" else "object"):
                if chunks.error is not None and piece.cut:
                    break
                yield _record(piece, chunks.skipped)
            if chunks.error is not None:
                yield self._truncated(chunks.error, chunks.read)

    def _truncated(self, error: Truncated, offset: int) -> RawRecord:
        message = f"{error}; what follows is lost"
        return RawRecord(line=self.lines + 1, byte_offset=offset, data=b"", problem=("truncated_compression", message))

    def _parquet(self) -> Iterator[RawRecord]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        shown = self.unit.file.shown
        with open_raw(self.unit.file) as raw, tempfile.TemporaryFile() as unpacked:
            try:
                seekable: Any = raw
                if self.unit.compression != "none":
                    # Parquet is read from its end, which a compressed stream cannot do.
                    shutil.copyfileobj(decompressed(raw, self.unit.compression), unpacked, _CHUNK)
                    seekable = unpacked
                row = 0
                for batch in pq.ParquetFile(seekable).iter_batches(batch_size=_PARQUET_ROWS):
                    for record in _dicts(batch):
                        row += 1
                        if isinstance(record, UnicodeDecodeError):
                            problem = ("invalid_utf8", f"a text of this row is not UTF-8: {record.reason}")
                            yield RawRecord(line=row, byte_offset=-1, data={}, problem=problem)
                        else:
                            yield RawRecord(line=row, byte_offset=-1, data=record)
            except (pa.ArrowException, OSError, Truncated) as error:
                raise DataError(
                    f"{shown}: cannot be read as Parquet: {error}", remedy="write the file again, or take it out"
                ) from None


def _dicts(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a batch; a row whose text is not UTF-8 as the error, and none but that row."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


class _Chunks:
    """A stream in chunks, without its BOM; a cut one ends early, and says so."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.skipped = self.read = 0
        self.error: Truncated | None = None

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                chunk = read_some(self._stream, _CHUNK)
            except Truncated as error:
                self.error = error
                return
            if not chunk:
                return
            if not self.read and chunk.startswith(BOM):
                self.skipped = len(BOM)
            yield chunk[self.skipped :] if not self.read else chunk
            self.read += len(chunk)


def _record(piece: Piece, skipped: int) -> RawRecord:
    problem = ("invalid_json", piece.problem) if piece.problem else None
    return RawRecord(
        line=piece.line, byte_offset=piece.offset + skipped, data=piece.data, cut=piece.cut, problem=problem
    )
