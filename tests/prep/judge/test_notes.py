"""What is odd about a file and costs no record: each code once a unit, with its first place and how often."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from dft_prep.sources import units
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import Unit, plan_units

GOOD = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": zstandard.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
}


def planned(path: Path) -> list[Unit]:
    (source,) = resolve_sources([str(path)])
    return plan_units(source.files[0], source.name)


def notes_of(unit: Unit) -> list[tuple[str, int, int, str]]:
    reader = UnitReader(unit)
    list(reader)
    return [(note.code, note.line, note.byte_offset, note.message) for note in reader.notes]


BOM = b"\xef\xbb\xbf"
PRETTY = json.dumps(json.loads(GOOD), indent=2).encode()
# Name of the file, its bytes -> (code, line, offset, message) of each note.
NOTES = {
    "nothing": ("a.jsonl", GOOD + b"\n" + GOOD, []),
    "bom": ("a.jsonl", BOM + GOOD + b"\n", [("bom", 1, 0, "a byte order mark")]),
    "bom of one line": ("a.jsonl", BOM + GOOD, [("bom", 1, 0, "a byte order mark")]),
    "bom of an array": ("a.json", BOM + b"[" + GOOD + b"]", [("bom", 1, 0, "a byte order mark")]),
    "crlf": ("a.jsonl", b"{}\n{}\r\n{}\r\n", [("crlf", 2, 3, "2 lines end with CR LF")]),
    "one crlf": ("a.jsonl", b"{}\r\n{}\n", [("crlf", 1, 0, "1 line ends with CR LF")]),
    "blank lines": ("a.jsonl", b"{}\n\n{}\n \t\n\n", [("blank_lines", 2, 3, "3 blank lines")]),
    "one blank line": ("a.jsonl", b"\n{}\n", [("blank_lines", 1, 0, "1 blank line")]),
    "a bom alone on its line": (
        "a.jsonl",
        BOM + b"\r\n{}\n",
        [
            ("bom", 1, 0, "a byte order mark"),
            ("crlf", 1, 3, "1 line ends with CR LF"),
            ("blank_lines", 1, 3, "1 blank line"),
        ],
    ),
    "lines in .json": ("a.json", GOOD + b"\n" + GOOD, [("lines_in_json", 1, 0, "a record a line, read as JSONL")]),
    "objects": (
        "a.json",
        PRETTY + b"\r\n" + PRETTY,
        [("objects_over_lines", 1, 0, "objects over several lines, read as records")],
    ),
    "empty": ("a.jsonl", b"", [("empty_file", 1, 0, "the file holds no records")]),
    "white space alone": (
        "a.jsonl",
        b"\n \n",
        [("empty_file", 1, 0, "the file holds no records"), ("blank_lines", 1, 0, "2 blank lines")],
    ),
    "a carriage return inside of a line": ("a.jsonl", b'{"a":\r1}\n', []),
}


@pytest.mark.parametrize("name", NOTES)
@pytest.mark.parametrize("compression", COMPRESS)
def test_each_oddity_of_a_file_is_noted_once_with_its_first_place(tmp_path, name, compression):
    file, data, expected = NOTES[name]
    (tmp_path / file).write_bytes(COMPRESS[compression](data))
    (unit,) = planned(tmp_path / file)
    assert notes_of(unit) == expected


def test_each_unit_notes_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 106)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "%s"}\r\n\r\n' % (b"x" * 40) * 3 + b"{}\n")
    assert [notes_of(unit) for unit in planned(tmp_path / "a.jsonl")] == [
        [("crlf", 1, 0, "4 lines end with CR LF"), ("blank_lines", 2, 51, "2 blank lines")],
        [("crlf", 1, 106, "2 lines end with CR LF"), ("blank_lines", 2, 157, "1 blank line")],
    ]
