from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dft_common.errors import DataError
from dft_prep.sources import units
from dft_prep.sources.files import FileError
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import line_range, plan_units, unit_fingerprint

RECORD = b'{"messages": [{"role": "user", "content": "q"}]}'
PRETTY = json.dumps(json.loads(RECORD), indent=2).encode()


@pytest.fixture
def plan(tmp_path):
    def run(data: bytes, name: str = "a.jsonl"):
        (tmp_path / name).write_bytes(data)
        (source,) = resolve_sources([str(tmp_path / name)])
        return plan_units(source.files[0], source.name)

    return run


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), out)
    return out.getvalue()


KINDS = {
    "lines": (RECORD + b"\n" + RECORD, "lines", "none"),
    "one line": (RECORD, "lines", "none"),
    "lines in a .json": (RECORD + b"\n" + RECORD, "lines", "none"),
    "a BOM": (b"\xef\xbb\xbf\r\n" + RECORD, "lines", "none"),
    "a first line that is cut": (RECORD[:-3] + b"\n" + 3 * (RECORD + b"\n"), "lines", "none"),
    "a first line that is no JSON": (b"oops\n" + 3 * (RECORD + b"\n"), "lines", "none"),
    "one broken line": (RECORD[:-3], "lines", "none"),
    "a line longer than what is looked at": (b'{"a": "' + b"x" * 3_000_000 + b'"}\n' + RECORD, "lines", "none"),
    "a deep line": (b'{"a": ' + b"[" * 20_000, "lines", "none"),
    "an array": (b" \n[" + RECORD + b"]", "array", "none"),
    "an array over lines": (b"[\n" + RECORD + b",\n" + RECORD + b"\n]", "array", "none"),
    "an array that is one of many lines": (b"[1]\n" + RECORD + b"\n" + RECORD, "lines", "none"),
    "a pretty object": (PRETTY, "object", "none"),
    "pretty objects": (PRETTY + b"\n" + PRETTY, "object", "none"),
    "gzip lines": (gzip.compress(RECORD), "lines", "gzip"),
    "gzip array": (gzip.compress(b"[" + RECORD + b"]"), "array", "gzip"),
    "zstd pretty": (zstandard.compress(PRETTY), "object", "zstd"),
    "parquet": (parquet(), "parquet", "none"),
}


@pytest.mark.parametrize("name", KINDS)
def test_content_decides_what_a_file_is(plan, name):
    data, kind, compression = KINDS[name]
    names = ["a.jsonl", "a.json", "a.txt"]
    if kind == "array":
        names.remove("a.jsonl")
    if "one of many" in name:
        names = ["a.jsonl"]
    for suffix in names:
        (unit,) = plan(data, suffix)
        assert (unit.kind, unit.compression, unit.start, unit.end) == (kind, compression, 0, -1)


OTHERS = {
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "zip": b"PK\x03\x04" + bytes(50),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "UTF-16": RECORD.decode().encode("utf-16"),
    "UTF-16 ": RECORD.decode().encode("utf-16-le"),
    "hello": b"hello world\nthis is text\n",
    "instruction,output": b"instruction,output\na,b\n",
}


@pytest.mark.parametrize("found", OTHERS)
def test_a_file_of_another_kind_is_named_and_said_to_be_what_it_is(plan, found):
    with pytest.raises(DataError) as raised:
        plan(OTHERS[found], "odd.jsonl")
    assert "odd.jsonl" in raised.value.message
    assert found.strip() in raised.value.message
    assert raised.value.remedy


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_an_array_that_is_called_jsonl_is_refused_with_the_remedy(plan, name):
    data = b"[\n" + RECORD + b",\n" + RECORD + b"\n]"
    with pytest.raises(FileError) as refusal:
        plan(gzip.compress(data) if name.endswith("gz") else data, name)
    assert refusal.value.code == "array_in_jsonl"
    assert "jq -c '.[]'" in refusal.value.remedy


def notes_of(units) -> list[str]:
    return [code for unit in units for code, _ in unit.notes]


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b" \r\n\n", gzip.compress(b"", mtime=0)])
def test_an_empty_file_is_one_unit_without_records_and_says_so(plan, data):
    planned = plan(data)
    assert notes_of(planned) == ["empty_file"]
    assert [list(UnitReader(unit)) for unit in planned] == [[]]


def test_what_is_odd_about_a_file_as_a_whole_is_noted_once(plan, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 30)
    lines = (RECORD + b"\n") * 5
    assert notes_of(plan(lines, "a.json")) == ["lines_in_json"]
    assert notes_of(plan(lines, "a.jsonl")) == []
    assert notes_of(plan(RECORD, "a.json")) == []
    assert notes_of(plan(PRETTY * 2, "a.json")) == ["objects_over_lines"]


def test_plain_lines_are_cut_at_fixed_places_and_nothing_else_is(plan, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    lines = (RECORD + b"\n") * 5
    assert [(unit.start, unit.end) for unit in plan(lines)] == [(0, 100), (100, 200), (200, -1)]
    assert len(plan(gzip.compress(lines))) == 1
    assert len(plan(b"[" + b",".join([RECORD] * 5) + b"]", "a.json")) == 1


def test_a_fingerprint_is_of_the_lines_of_the_unit_alone(plan, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    lines = [b'{"n": %d, "text": "%s"}\n' % (number, b"x" * 30) for number in range(9)]
    before = [unit_fingerprint(unit) for unit in plan(b"".join(lines))]
    assert len(set(before)) == len(before) == 5
    lines[-1] = lines[-1].replace(b"x", b"y")
    after = [unit_fingerprint(unit) for unit in plan(b"".join(lines))]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True] * 4 + [False]
    (whole,) = plan(zipped := gzip.compress(b"".join(lines), mtime=0))
    (other,) = plan(zipped[:-1] + b"\1", "b.gz")
    assert unit_fingerprint(whole) != unit_fingerprint(other)


def test_a_unit_inside_of_a_long_line_looks_at_no_more_than_itself(plan, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 16)
    monkeypatch.setattr(units, "_LINE_PIECE", 1 << 10)
    long = b'{"a": "' + b"x" * 3_000_000 + b'"}'
    planned = plan(RECORD + b"\n" + long + b"\n" + RECORD + b"\n")
    ranges = [line_range(unit) for unit in planned]
    assert ranges[0] == (0, len(RECORD) + 1 + len(long) + 1)
    assert all(first == last == unit.end for (first, last), unit in list(zip(ranges, planned, strict=True))[1:-1])
    assert ranges[-1] == (ranges[0][1], -1)
    read = 0

    class Counted(io.BufferedReader):
        def readline(self, size: int | None = -1, /) -> bytes:
            nonlocal read
            line = super().readline(size)
            read += len(line)
            return line

    monkeypatch.setattr(units, "open_raw", lambda file: Counted(io.FileIO(file.path)))
    line_range(planned[3])
    assert 0 < read <= units.UNIT_BYTES + units._LINE_PIECE
