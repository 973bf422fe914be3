from __future__ import annotations

import gzip
import io
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dft_common.errors import DataError
from dft_prep import units
from dft_prep.sources import resolve_sources
from dft_prep.units import plan_units, unit_fingerprint

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
    "an array in a .jsonl": (b"[\n" + RECORD + b",\n" + RECORD + b"\n]", "array", "none"),
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
    for suffix in ("a.jsonl", "a.json", "a.txt"):
        (unit,) = plan(data, suffix)
        assert (unit.kind, unit.compression, unit.start, unit.end) == (kind, compression, 0, -1)


OTHERS = {
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "zip": b"PK\x03\x04" + bytes(50),
    "xz": b"\xfd7zXZ\0" + bytes(50),
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


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b" \r\n\n", gzip.compress(b"", mtime=0)])
def test_an_empty_file_has_no_units_and_a_warning(plan, caplog, data):
    with caplog.at_level(logging.WARNING, "dft"):
        assert plan(data) == []
    assert "empty" in caplog.text


def test_plain_lines_are_cut_at_fixed_places_and_nothing_else_is(plan, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    lines = (RECORD + b"\n") * 5
    assert [(unit.start, unit.end) for unit in plan(lines)] == [(0, 100), (100, 200), (200, -1)]
    assert len(plan(gzip.compress(lines))) == 1
    assert len(plan(b"[" + b",".join([RECORD] * 5) + b"]")) == 1


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
