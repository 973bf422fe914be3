"""A work unit -> raw records: the bytes of one JSON text each, with their place. Nothing is parsed or inferred here.

Called by `work`, `build` (sample), `preview` and `validate.command`. Memory holds a record and a chunk, whatever the
file's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from dft_prep.sources.files import (
    BOM,
    Truncated,
    check_unchanged,
    decompressed,
    open_raw,
    read_some,
    unreadable,
)
from dft_prep.sources.json_stream import Piece, split_values
from dft_prep.sources.parquet import parquet_rows
from dft_prep.sources.units import Unit, line_range

_CHUNK = 1 << 18  # of it the lines stay in the cache while they are cut
LARGEST_RECORD = 256 << 20
"""Bytes. No conversation has as many, and decoded it takes several times as much memory in each worker."""
KEPT_OF_LARGE = 1 << 16
"""Bytes that the quarantine keeps of a larger one."""


class RawRecord(msgspec.Struct, frozen=True, gc=False):
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
    is_line: bool = False
    """It is one of many lines, each of which should be a record."""
    column: int = 1
    """Of its first character in its line."""


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
        self.passed = 0
        """Bytes of the unit, as they lie in the file, that were read so far."""
        self.notes: list[FileNote] = []
        """Complete when the last record was read; one a code."""

    def __iter__(self) -> Iterator[RawRecord]:
        """Raises FileError where the file cannot be read, or changes meanwhile."""
        file = self.unit.file
        self.notes = [FileNote(code=code, line=1, byte_offset=0, message=message) for code, message in self.unit.notes]
        read = {"parquet": self._parquet, "lines": self._lines}.get(self.unit.kind, self._values)
        check_unchanged(file)
        try:
            yield from read()
        except OSError as error:
            raise unreadable(file, error) from None
        check_unchanged(file)

    def _lines(self) -> Iterator[RawRecord]:
        """Lines, a block at a time: the cost of a record is that of cutting it off."""
        unit = self.unit
        first, last = line_range(unit) if unit.compression == "none" else (0, -1)
        with open_raw(unit.file) as raw:
            raw.seek(first)
            stream = decompressed(raw, unit.file, unit.compression)
            at, read, line, blanks, returns = first, first, 0, 0, 0
            begun = _Begun()
            truncated: Truncated | None = None
            while truncated is None:
                try:
                    block = read_some(stream, _CHUNK if last < 0 else min(_CHUNK, last - read))
                except Truncated as error:
                    truncated, block = error, b""
                if not block:
                    break
                read += len(block)
                lines = block.split(b"\n")
                if len(lines) == 1:
                    begun.add(block)
                    continue
                rest = lines.pop()
                if begun.length:
                    begun.add(lines[0])
                    lines[0] = begun.data()
                    if begun.length > LARGEST_RECORD:
                        line += 1
                        yield RawRecord(line, at, begun.data(), False, begun.problem(), True)
                        at += begun.length + 1
                        del lines[0]
                    begun = _Begun()
                if at == 0 and lines and lines[0].startswith(BOM):
                    lines[0], at = self._without_bom(lines[0])
                if b"\r" in block or (lines and lines[0].endswith(b"\r")):
                    returns += self._returns(lines, line, at)
                for text in lines:
                    line += 1
                    if not text or text.isspace():
                        blanks += 1
                        self._note("blank_lines", line, at, "blank lines")
                    else:
                        yield RawRecord(line, at, text, False, None, True)
                    at += len(text) + 1
                begun.add(rest)
                self.lines = line
                self.passed = (raw.tell() if unit.compression != "none" else read) - first
            yield from self._last(begun, line, at, truncated)
        self._note_count("blank_lines", f"{blanks:,} blank {'line' if blanks == 1 else 'lines'}")
        self._note_count("crlf", f"{returns:,} {'line ends' if returns == 1 else 'lines end'} with CR LF")

    def _last(self, begun: _Begun, line: int, at: int, truncated: Truncated | None) -> Iterator[RawRecord]:
        """What stands behind the last newline of the file."""
        data, problem = begun.data(), begun.problem()
        if at == 0 and data.startswith(BOM):
            data, at = self._without_bom(data)
        if truncated is not None:
            problem = ("truncated_compression", f"{truncated}; what follows is lost")
        if problem is not None or data.strip():
            yield RawRecord(line + 1, at, data, True, problem, True)

    def _without_bom(self, line: bytes) -> tuple[bytes, int]:
        """The file's first line, and its offset."""
        self._note("bom", 1, 0, "a byte order mark")
        return line[len(BOM) :], len(BOM)

    def _returns(self, lines: list[bytes], line: int, at: int) -> int:
        """How many of `lines` end with CR LF. line, at: the number of the line before them, and where they begin."""
        returns = 0
        for text in lines:
            line += 1
            if text.endswith(b"\r"):
                if not returns:
                    self._note("crlf", line, at, "lines end with CR LF")
                returns += 1
            at += len(text) + 1
        return returns

    def _note(self, code: str, line: int, byte_offset: int, message: str) -> None:
        if all(note.code != code for note in self.notes):
            self.notes.append(FileNote(code=code, line=line, byte_offset=byte_offset, message=message))

    def _note_count(self, code: str, message: str) -> None:
        """Say of a note, if it was made, how often it was found, now that all was read."""
        self.notes = [
            msgspec.structs.replace(note, message=message) if note.code == code else note for note in self.notes
        ]

    def _values(self) -> Iterator[RawRecord]:
        with open_raw(self.unit.file) as raw:
            chunks = _Chunks(decompressed(raw, self.unit.file, self.unit.compression))
            kind = "array" if self.unit.kind == "array" else "object"
            for piece in split_values(iter(chunks), kind, largest=LARGEST_RECORD, kept=KEPT_OF_LARGE):
                self.passed = raw.tell()
                if chunks.error is not None and piece.cut:
                    yield self._truncated(chunks.error, piece, chunks.skipped)
                    break
                yield _record(piece, chunks.skipped)
            else:
                if chunks.error is not None:
                    end = Piece(offset=chunks.read - chunks.skipped, line=1, column=1, data=b"", size=0)
                    yield self._truncated(chunks.error, end, chunks.skipped)
            if chunks.skipped:
                self._note("bom", 1, 0, "a byte order mark")

    def _truncated(self, error: Truncated, piece: Piece, skipped: int) -> RawRecord:
        problem = ("truncated_compression", f"{error}; what follows is lost")
        return RawRecord(piece.line, piece.offset + skipped, piece.data, True, problem, False, piece.column)

    def _parquet(self) -> Iterator[RawRecord]:
        for row, record in enumerate(parquet_rows(self.unit.file, self.unit.compression), 1):
            if isinstance(record, UnicodeDecodeError):
                problem = ("invalid_utf8", f"a text of this row is not UTF-8: {record.reason}")
                yield RawRecord(row, -1, {}, problem=problem)
            else:
                yield RawRecord(row, -1, record)


class _Begun:
    """A line that is not at its end yet. Of one beyond the limit only the beginning is kept."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.length = 0

    def add(self, piece: bytes) -> None:
        was_large = self.length > LARGEST_RECORD
        self.length += len(piece)
        if was_large:
            return
        self._pieces.append(piece)
        if self.length > LARGEST_RECORD:
            kept = b""
            for piece in self._pieces:
                kept += piece[: KEPT_OF_LARGE - len(kept)]
            self._pieces = [kept]

    def data(self) -> bytes:
        return b"".join(self._pieces)

    def problem(self) -> tuple[str, str] | None:
        return too_large(self.length) if self.length > LARGEST_RECORD else None


def too_large(size: int) -> tuple[str, str]:
    limit = LARGEST_RECORD >> 20
    return "record_too_large", f"{size:,} bytes, and a record may have {limit} MiB; only its beginning is kept"


class _Chunks:
    """A stream in chunks, without its BOM; a cut one ends early, and says so."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.skipped = self.read = 0
        self.error: Truncated | None = None

    def __iter__(self) -> Iterator[bytes]:
        beginning = self._read()
        while len(beginning) < len(BOM) and (more := self._read()):
            beginning += more
        if beginning.startswith(BOM):
            self.skipped = len(BOM)
        yield beginning[self.skipped :]
        while chunk := self._read():
            yield chunk

    def _read(self) -> bytes:
        if self.error is not None:
            return b""
        try:
            chunk = read_some(self._stream, _CHUNK)
        except Truncated as error:
            self.error = error
            return b""
        self.read += len(chunk)
        return chunk


def _record(piece: Piece, skipped: int) -> RawRecord:
    problem = ("invalid_json", piece.problem) if piece.problem else None
    if piece.size > LARGEST_RECORD:
        problem = too_large(piece.size)
    return RawRecord(piece.line, piece.offset + skipped, piece.data, piece.cut, problem, False, piece.column)
