"""Open a data file, wherever it is and however it is compressed, and tell what it holds from its first bytes.

Called by `units` (what is it?) and `readers` (its bytes). Content decides, never the suffix.
"""

from __future__ import annotations

import gzip
import io
import lzma
import re
import shlex
import zlib
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import msgspec

from dft_common.errors import DataError
from dft_prep.sources import SourceFile, is_url, stamp_of

Compression = Literal["none", "gzip", "zstd", "xz"]
Kind = Literal["lines", "array", "object", "parquet"]

BOM = b"\xef\xbb\xbf"
_SNIFFED = 1 << 16
_SNIFFED_LINES = 20
_ZSTD_PIECE = 1 << 12
"""Bytes fed to zstd at a time. A block of 4 bytes may hold 128 KiB, so these inflate to 128 MiB at most."""
_XZ_PIECE = 1 << 14
_XZ_MEMORY = 512 << 20
_KNOWN = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"BZh": "a bzip2 archive",
    b"ARROW1": "an Arrow file",
    b"\x80\x04\x95": "a Python pickle",
    b"SQLite": "an SQLite database",
    b"GIF8": "a GIF picture",
    b"RIFF": "a sound or picture (RIFF)",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x7fELF": "a program",
    b"<!DOCTYPE": "an HTML page",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
_JSONL_NAME = re.compile(r"\.(jsonl|ndjson)(\.(gz|zst|xz))?$", re.IGNORECASE)
_JSON_NAME = re.compile(r"\.json(\.(gz|zst|xz))?$", re.IGNORECASE)
_GROWTH, _GROWTH_FROM = 500, 256 << 20
"""A file may unpack to so many times its size, or to so many bytes. Chat logs unpack to 3 to 50 times; a gzip bomb's
zeros to 1,000."""


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


def unreadable(file: SourceFile, error: Exception) -> FileError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return FileError("unreadable_file", f"{file.shown}: {reason}", remedy="check the file, its links and permissions")


def open_raw(file: SourceFile) -> BinaryIO:
    """The file's own bytes. Raises FileError where it cannot be opened (any more)."""
    if not is_url(file.path):
        try:
            return Path(file.path).open("rb")
        except OSError as error:
            raise unreadable(file, error) from None
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(file.path)
        return cast(BinaryIO, io.BufferedReader(system.open(path, "rb")))
    except Exception as error:  # drivers raise errors of many kinds of their own
        raise unreadable(file, error) from None


def check_unchanged(file: SourceFile) -> None:
    """Raise FileError where a local file is not the one that was found: its units would not fit together."""
    if file.stamp is None:
        return
    try:
        stamp = stamp_of(Path(file.path).stat())
    except OSError as error:
        raise unreadable(file, error) from None
    if stamp != file.stamp:
        raise FileError(
            "file_changed",
            f"{file.shown}: changed while it was read ({file.size:,} bytes before, {stamp[0]:,} now)",
            remedy="run again when nothing writes to it",
        )


def check_growth(file: SourceFile, unpacked: int, packed: int) -> None:
    """Raise FileError where so many bytes come out of so few that they are no text."""
    if unpacked > _GROWTH_FROM and unpacked > _GROWTH * packed:
        raise FileError(
            "decompression_bomb",
            f"{file.shown}: unpacks to more than {_GROWTH} times its size ({unpacked >> 20:,} MiB of {packed:,} bytes)",
            remedy="unpack it, look at it, and give the text itself if it is meant",
        )


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


class _XzStream(io.RawIOBase):
    """The content of an .xz file; its errors in our words."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # any writable buffer, as io.RawIOBase has it
        try:
            data = self._next(len(buffer))
        except lzma.LZMAError as error:
            raise Truncated(f"the xz stream is damaged: {error}") from None
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        while True:
            if self._decompressor.eof:
                # Another stream may follow, behind padding of zeros.
                rest = (self._decompressor.unused_data or self._raw.read(_XZ_PIECE)).lstrip(b"\0")
                if not rest:
                    return b""
                self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
            elif self._decompressor.needs_input:
                rest = self._raw.read(_XZ_PIECE)
                if not rest:
                    raise Truncated("the xz stream is cut")
            else:
                rest = b""
            if data := self._decompressor.decompress(rest, size):
                return data


class _Guarded(io.RawIOBase):
    """What comes out of a compressed stream, as long as it is in proportion to the file."""

    def __init__(self, unpacked: io.RawIOBase, raw: BinaryIO, file: SourceFile) -> None:
        self._unpacked, self._raw, self._file = unpacked, raw, file
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # any writable buffer, as io.RawIOBase has it
        count = cast(int, self._unpacked.readinto(buffer))
        self._size += count
        if self._size > _GROWTH_FROM:
            check_growth(self._file, self._size, self._raw.tell())
        return count


def compression_of(start: bytes) -> Compression:
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    if start.startswith(b"\xfd7zXZ"):
        return "xz"
    return "zstd" if start.startswith(b"\x28\xb5\x2f\xfd") else "none"


def decompressed(raw: BinaryIO, file: SourceFile, compression: Compression) -> BinaryIO:
    """The content of `file`, opened as `raw`. Reading raises Truncated where a compressed stream is cut or damaged."""
    if compression == "none":
        return raw
    unpacked = {"gzip": _GzipStream, "zstd": _ZstdStream, "xz": _XzStream}[compression](raw)
    return cast(BinaryIO, io.BufferedReader(_Guarded(unpacked, raw, file), 1 << 16))


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


class Sniffed(NamedTuple):
    """What a file is, by its first bytes."""

    compression: Compression
    kind: Kind | None
    """None: it holds nothing."""
    notes: tuple[tuple[str, str], ...] = ()
    """(code, message) of what is odd about it as a whole."""


def sniff(file: SourceFile) -> Sniffed:
    """How the file is compressed, and what it holds. Raises FileError for what is no chat data."""
    with open_raw(file) as raw:
        try:
            compression = compression_of(raw.read(6))
            raw.seek(0)
            head, truncated = _read_up_to(decompressed(raw, file, compression), _SNIFFED)
        except OSError as error:
            raise unreadable(file, error) from None
    if head.startswith(b"PAR1"):
        return Sniffed(compression, "parquet")
    _refuse_other_kinds(file, head)
    text = head.removeprefix(BOM).lstrip()
    if not text:
        empty = ("empty_file", "the file holds no records")
        return Sniffed(compression, "lines") if truncated else Sniffed(compression, None, (empty,))
    complete = len(head) < _SNIFFED
    if text.startswith(b"[") and not _is_line_of_many(file, text):
        if _JSONL_NAME.search(file.path):
            raise FileError(
                "array_in_jsonl",
                f"{file.shown}: is called JSONL, and holds one JSON array",
                remedy="rename it to .json, or write it as lines: jq -c '.[]' FILE",
            )
        return Sniffed(compression, "array")
    kind = _lines_or_object(file, text, complete=complete)
    if kind == "object":
        return Sniffed(compression, kind, (("objects_over_lines", "objects over several lines, read as records"),))
    several = b"\n" in text.rstrip()
    if several and _JSON_NAME.search(file.path):
        return Sniffed(compression, kind, (("lines_in_json", "a record a line, read as JSONL"),))
    return Sniffed(compression, kind)


def _is_line_of_many(file: SourceFile, text: bytes) -> bool:
    """Whether an array that a file begins with is but one line of a JSONL file: a bad record, not the file's form."""
    first, _, rest = text.partition(b"\n")
    if not _JSONL_NAME.search(file.path) or not rest.strip():
        return False
    try:
        msgspec.json.decode(first, type=list)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _refuse_other_kinds(file: SourceFile, head: bytes) -> None:
    for magic, name in _KNOWN.items():
        if head.startswith(magic):
            raise FileError(
                "other_kind", f"{file.shown}: this is {name}, not chat data", remedy="take it out of --data_files"
            )
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    # Without a mark: every second byte of what is mostly ASCII is 0.
    alternating = bytes(head[:2]).count(0) == 1 and head[:200].count(0) * 2 >= len(head[:200]) - 1
    if wide or alternating:
        raise FileError(
            "utf16",
            f"{file.shown}: this is UTF-16 or UTF-32, expected UTF-8",
            remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {shlex.quote(file.shown)} > converted.jsonl",
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
    raise FileError(
        "other_kind",
        f"{file.shown}: expected JSON records, found {text[:40]!r}",
        remedy="give JSONL (one object a line), a JSON array, or Parquet",
    )
