"""Open a data file, wherever it is and however it is compressed; the error of a file that cannot be read.

Called by `sniff`, `units` and `readers`. Content decides how a file is compressed, never the suffix.
"""

from __future__ import annotations

import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from dft_common.errors import DataError
from dft_prep.sources.named import SourceFile, is_url, stamp_of

Compression = Literal["none", "gzip", "zstd", "xz"]

BOM = b"\xef\xbb\xbf"
_ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
"""Of a frame, or of a skippable one (RFC 8878, 3.1.2), which pzstd begins its files with."""
_ZSTD_PIECE = 1 << 12
"""Bytes fed to zstd at a time. A block of 4 bytes may hold 128 KiB, so these inflate to 128 MiB at most."""
_XZ_PIECE = 1 << 14
_XZ_MEMORY = 512 << 20
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


def _damaged(form: str, error: Exception) -> Truncated:
    # What a checksum covers was handed out before it is known to be wrong.
    return Truncated(f"the {form} stream is damaged ({error}), and records before this place may be damaged too")


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
        return cast(BinaryIO, io.BufferedReader(_Remote(system.open(path, "rb"))))
    except Exception as error:  # drivers raise errors of many kinds of their own
        raise unreadable(file, error) from None


class _Remote(io.RawIOBase):
    """A file of a driver, whose errors of many kinds are OSErrors here."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # any writable buffer, as io.RawIOBase has it
        data = self._try(self._opened.read, len(buffer))
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._try(self._opened.seek, offset, whence)
        return self.tell()

    def tell(self) -> int:
        return self._try(self._opened.tell)

    def close(self) -> None:
        if not self.closed:
            self._try(self._opened.close)
        super().close()

    def _try(self, do: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except OSError:
            raise
        except Exception as error:
            raise OSError(str(error) or type(error).__name__) from error


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
            raise _damaged("zstd", error) from None
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
            raise _damaged("gzip", error) from None
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
            raise _damaged("xz", error) from None
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        while True:
            if self._decompressor.eof:
                # Another stream may follow, behind padding of zeros.
                rest = self._decompressor.unused_data.lstrip(b"\0")
                while not rest and (piece := self._raw.read(_XZ_PIECE)):
                    rest = piece.lstrip(b"\0")
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
    return "zstd" if _ZSTD_MAGIC.match(start) else "none"


def decompressed(raw: BinaryIO, file: SourceFile, compression: Compression) -> BinaryIO:
    """The content of `file`, opened as `raw`. Reading raises Truncated where a compressed stream is cut or damaged."""
    if compression == "none":
        return raw
    unpacked = {"gzip": _GzipStream, "zstd": _ZstdStream, "xz": _XzStream}[compression](raw)
    return cast(BinaryIO, io.BufferedReader(_Guarded(unpacked, raw, file), 1 << 16))


def read_some(stream: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes in one read. A longer read would lose what came before an error."""
    return cast(io.BufferedReader, stream).read1(size)
