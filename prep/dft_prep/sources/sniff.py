"""Tell what a data file holds from its first bytes.

Called by `units` and `decontaminate`. Content decides, never the suffix; but a file that is called JSONL promises a
record a line.
"""

from __future__ import annotations

import re
import shlex
from typing import BinaryIO, Literal, NamedTuple

import msgspec

from dft_prep.sources.files import (
    BOM,
    Compression,
    FileError,
    Truncated,
    compression_of,
    decompressed,
    open_raw,
    read_some,
    unreadable,
)
from dft_prep.sources.named import SourceFile

Kind = Literal["lines", "array", "object", "parquet"]

_SNIFFED = 1 << 16
_SNIFFED_LINES = 20
_KNOWN = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"BZh": "a bzip2 archive",
    b"ARROW1": "an Arrow file",
    b"\x80\x04\x95": "a Python pickle",
    b"\x80\x05\x95": "a Python pickle",
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
_WIDE = {
    # By a byte order mark, which iconv takes away,
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32",
    rb"\xff\xfe|\xfe\xff": "UTF-16",
    # or by the two characters of ASCII that every JSON text of two or more begins with.
    rb"[^\0]\0\0\0[^\0]\0\0\0": "UTF-32LE",
    rb"\0\0\0[^\0]\0\0\0[^\0]": "UTF-32BE",
    rb"[^\0]\0[^\0]\0": "UTF-16LE",
    rb"\0[^\0]\0[^\0]": "UTF-16BE",
}
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


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
    # In an array an object is followed by a comma or a bracket: never is more than half of its lines an object each.
    others = [line for line in rest.split(b"\n") if line.strip()][:_SNIFFED_LINES]
    if 2 * sum(_is_object(line) for line in others) > len(others):
        return True
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
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + len(_TAR_MAGIC)] == _TAR_MAGIC:
        raise FileError(
            "other_kind", f"{file.shown}: this is a tar archive, not chat data", remedy="unpack it, and give its files"
        )
    for pattern, encoding in _WIDE.items():
        if re.match(pattern, head, re.DOTALL):
            raise FileError(
                "utf16",
                f"{file.shown}: this is {encoding}, expected UTF-8",
                remedy=f"convert it: iconv -f {encoding} -t UTF-8 < {shlex.quote(file.shown)} > converted.jsonl",
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
    half_is_enough = _JSONL_NAME.search(file.path) is not None
    if _is_object(lines[0]) or 2 * objects + half_is_enough > len(lines):
        return "lines"
    if text.startswith(b"{"):
        return "lines" if len(lines) == 1 else "object"
    if len(lines) > 1 and all(line.lstrip().startswith(b"[") for line in lines):
        message = f"{file.shown}: each line is an array, and a record is an object: found {text[:40]!r}"
        remedy = "where they are lists of messages: jq -c '{messages: .}' FILE"
        raise FileError("other_kind", message, remedy=remedy)
    raise FileError(
        "other_kind",
        f"{file.shown}: expected JSON records, found {text[:40]!r}",
        remedy="give JSONL (one object a line), a JSON array, or Parquet",
    )


def _read_up_to(stream: BinaryIO, size: int) -> tuple[bytes, bool]:
    """(the first bytes, whether the stream was cut there)"""
    data = b""
    try:
        while len(data) < size and (more := read_some(stream, size - len(data))):
            data += more
    except Truncated:
        return data, True  # enough to tell the kind by; `readers` reports the cut
    return data, False
