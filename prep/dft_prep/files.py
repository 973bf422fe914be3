"""Open a data file, wherever it is and however it is compressed, and tell what it holds from its first bytes.

Called by `units` (what is it?) and `readers` (its bytes). Content decides, never the suffix.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO, Literal, cast

import msgspec

from dft_common.errors import DataError
from dft_prep.sources import SourceFile, is_url

Compression = Literal["none", "gzip", "zstd"]
Kind = Literal["lines", "array", "object", "parquet"]

BOM = b"\xef\xbb\xbf"
_SNIFFED = 1 << 16
_SNIFFED_LINES = 20
_ZSTD_PIECE = 1 << 12
"""Bytes fed to zstd at a time. A block of 4 bytes may hold 128 KiB, so these inflate to 128 MiB at most."""
_KNOWN = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"ARROW1": "an Arrow file",
    b"\x80\x04\x95": "a Python pickle",
    b"SQLite": "an SQLite database",
}


class FileError(DataError):
    """A file from which no record can be read. `code` is one of the scope `file` in `codes.CODES`."""

    def __init__(self, code: str, message: str, *, remedy: str) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code

    def __reduce__(self) -> tuple:
        return _rebuild_file_error, (self.code, self.message, self.remedy)


def _rebuild_file_error(code: str, message: str, remedy: str) -> FileError:
    return FileError(code, message, remedy=remedy)


class Truncated(Exception):
    """A compressed stream ends before its end, or is damaged. Says where, in words."""


def open_raw(file: SourceFile) -> BinaryIO:
    """The file's own bytes. Raises DataError where it cannot be opened (any more)."""
    try:
        if is_url(file.path):
            import fsspec

            system, path = fsspec.core.url_to_fs(file.path)
            return cast(BinaryIO, io.BufferedReader(system.open(path, "rb")))
        return Path(file.path).open("rb")
    except OSError as error:
        raise DataError(
            f"{file.shown}: {error.strerror or error}", remedy="check the file and its permissions"
        ) from None


class _ZstdStream(io.RawIOBase):
    """The content of a .zst file of one frame or several; unlike zstandard's own reader it notices a cut one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._make = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame = None
        self._input = b""
        self._ready = memoryview(b"")  # a view, so that handing out a part copies nothing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # any writable buffer, as io.RawIOBase has it
        view = memoryview(buffer)
        while not self._ready:
            if not self._input:
                self._input = self._raw.read(_ZSTD_PIECE)
                if not self._input:
                    if self._frame is not None:
                        raise Truncated("the zstd stream is cut")
                    return 0
            self._decompress()
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> None:
        self._frame = self._frame or self._make()
        try:
            self._ready = memoryview(self._frame.decompress(self._input))
        except self._error as error:
            raise Truncated(f"the zstd stream is damaged: {error}") from None
        self._input = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None


class _GzipStream(io.RawIOBase):
    """The content of a .gz file; its errors in our words."""

    def __init__(self, raw: BinaryIO) -> None:
        self._gzip = gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # any writable buffer, as io.RawIOBase has it
        try:
            # read1 hands out what was decompressed before an error; read would lose it.
            data = self._gzip.read1(len(buffer))
        except EOFError:
            raise Truncated("the gzip stream is cut") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise Truncated(f"the gzip stream is damaged: {error}") from None
        memoryview(buffer)[: len(data)] = data
        return len(data)


def compression_of(start: bytes) -> Compression:
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    return "zstd" if start.startswith(b"\x28\xb5\x2f\xfd") else "none"


def decompressed(raw: BinaryIO, compression: Compression) -> BinaryIO:
    """`raw`'s content. Reading from it raises Truncated where a compressed stream is cut or damaged."""
    if compression == "none":
        return raw
    stream = _GzipStream(raw) if compression == "gzip" else _ZstdStream(raw)
    return cast(BinaryIO, io.BufferedReader(stream, 1 << 16))


def _read_up_to(stream: BinaryIO, size: int) -> tuple[bytes, bool]:
    """(the first bytes, whether the stream was cut there)"""
    data = b""
    try:
        while len(data) < size and (more := read_some(stream, size - len(data))):
            data += more
    except Truncated:
        return data, True  # enough to tell the kind by; `readers` reports the cut
    return data, False


def read_some(stream: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes in one read. A longer read would lose what came before an error."""
    return cast(io.BufferedReader, stream).read1(size)


def sniff(file: SourceFile) -> tuple[Compression, Kind | None]:
    """How the file is compressed, and what it holds (None: nothing). Raises DataError for what is no chat data."""
    with open_raw(file) as raw:
        compression = compression_of(raw.read(4))
        raw.seek(0)
        head, truncated = _read_up_to(decompressed(raw, compression), _SNIFFED)
    if head.startswith(b"PAR1"):
        return compression, "parquet"
    _refuse_other_encodings(file, head)
    text = head.removeprefix(BOM).lstrip()
    if not text:
        return compression, "lines" if truncated else None
    if text.startswith(b"["):
        return compression, "array"
    return compression, _lines_or_object(file, text, complete=len(head) < _SNIFFED)


def _refuse_other_encodings(file: SourceFile, head: bytes) -> None:
    for magic, name in _KNOWN.items():
        if head.startswith(magic):
            raise DataError(f"{file.shown}: this is {name}, not chat data", remedy="take it out of --data_files")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[1:2] == b"\0":
        raise DataError(
            f"{file.shown}: this is UTF-16, expected UTF-8",
            remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {file.shown} > converted.jsonl",
        )


def _is_object(line: bytes) -> bool:
    """Whether a line is, or at least looks like, one JSON object."""
    line = line.strip()
    if line.startswith(b"{") and line.endswith(b"}") and len(line) > 2:
        return True
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _lines_or_object(file: SourceFile, text: bytes, *, complete: bool) -> Kind:
    lines = [line for line in text.split(b"\n") if line.strip()]
    if not complete and len(lines) > 1:
        lines.pop()  # cut by the end of what was sniffed
    lines = lines[:_SNIFFED_LINES]
    objects = sum(_is_object(line) for line in lines)
    if _is_object(lines[0]) or 2 * objects > len(lines):
        return "lines"
    if text.startswith(b"{"):
        return "lines" if len(lines) == 1 else "object"
    raise DataError(
        f"{file.shown}: expected JSON records, found {text[:40]!r}",
        remedy="give JSONL (one object a line), a JSON array, or Parquet",
    )
