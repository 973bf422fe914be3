from __future__ import annotations

import gzip
import io
import json
import random
import tracemalloc
from unittest import mock

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dft_common.errors import DataError
from dft_prep.sources import readers, units
from dft_prep.sources.named import SourceFile, resolve_sources
from dft_prep.sources.readers import RawRecord, UnitReader
from dft_prep.sources.units import Unit, plan_units, unit_fingerprint

RECORDS = [json.dumps({"n": number, "text": "é\u2028" * number}, ensure_ascii=False).encode() for number in range(50)]
LINES = b"\n".join(RECORDS) + b"\n"


def read(path) -> list[RawRecord]:
    (source,) = resolve_sources([str(path)])
    (unit,) = plan_units(source.files[0], source.name)
    return list(UnitReader(unit))


def write(tmp_path, data: bytes, name: str = "a"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


PIECES = st.lists(
    st.sampled_from(
        [b'{"a": 1}', b'{"b": "\xe2\x80\xa8\xc2\x85\x0b"}', b"", b"  ", b"\t", b"x" * 30, b"\xff", b"\x00"]
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300)
@given(PIECES, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans(), st.integers(1, 60))
def test_ranges_cover_every_line_exactly_once_whatever_their_size(tmp_path_factory, parts, end, last, bom, size):
    data = (b"\xef\xbb\xbf" if bom else b"") + end.join(parts) + (end if last else b"")
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(data)
    file = SourceFile(path=str(path), shown="a", relative="a", size=len(data))
    expected, offset = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if text.strip():
            expected.append((number, offset + len(line) - len(text), text))
        offset += len(line) + 1
    found, lines = [], 0
    for start in range(0, len(data) or 1, size):
        stop = start + size if start + size < len(data) else -1
        reader = UnitReader(Unit(file=file, source="a", kind="lines", compression="none", start=start, end=stop))
        for raw in reader:
            found.append((lines + raw.line, raw.byte_offset, raw.data))
            begin = data.rfind(b"\n", 0, raw.byte_offset) + 1
            assert start <= begin < (stop if stop >= 0 else len(data))
        lines += reader.lines
    assert found == expected
    assert lines == data.count(b"\n")


@settings(max_examples=200)
@given(PIECES, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans(), st.integers(1, 40))
@example([b'{"a": 1}', b'{"a": 1}'], b"\r\n", True, True, 2)
@example([b'{"a": 1}'], b"\r\n", True, False, 9)
def test_blocks_of_any_size_give_the_same_records_and_notes(tmp_path_factory, parts, end, last, bom, size):
    data = (b"\xef\xbb\xbf" if bom else b"") + end.join(parts) + (end if last else b"")
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(data)
    file = SourceFile(path=str(path), shown="a", relative="a", size=len(data))
    found = []
    for block in (1 << 20, size):
        with mock.patch.object(readers, "_CHUNK", block):
            reader = UnitReader(Unit(file=file, source="a", kind="lines", compression="none", start=0, end=-1))
            found.append((list(reader), {note.code: note for note in reader.notes}, reader.lines))
    assert found[0] == found[1]
    returns = data.count(b"\r\n")
    assert ("crlf" in found[0][1]) == (returns > 0)
    if returns:
        assert found[0][1]["crlf"].message.startswith(f"{returns} line")


def test_fingerprints_of_ranges_change_with_their_own_lines_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 300)
    path = write(tmp_path, LINES)

    def hashes() -> list[str]:
        (source,) = resolve_sources([str(path)])
        return [unit_fingerprint(unit) for unit in plan_units(source.files[0], "a")]

    before = hashes()
    path.write_bytes(LINES.replace(b'"n": 20', b'"n": 99'))
    assert sum(old != new for old, new in zip(before, hashes(), strict=True)) == 1


@pytest.mark.parametrize("last", [b"\n", b""])
def test_a_last_line_without_its_newline_is_marked(tmp_path, last):
    records = read(write(tmp_path, LINES[:-1] + last))
    assert [raw.data for raw in records] == RECORDS
    assert [raw.cut for raw in records] == [False] * 49 + [last == b""]


CONTAINERS = {
    "lines": LINES,
    "array": b"[\n" + b",\n".join(RECORDS) + b"\n]",
    "objects": b"{\n" + b"\n{\n".join(record[1:] for record in RECORDS),
}
COMPRESSIONS = {
    "gzip": lambda data: gzip.compress(data),
    "two gzip members": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
    "padded gzip": lambda data: gzip.compress(data) + bytes(512),
    "zstd": lambda data: zstandard.compress(data),
    "two zstd frames": lambda data: zstandard.compress(data[:99]) + zstandard.compress(data[99:]),
    "zstd behind a skippable frame": lambda data: b"\x50\x2a\x4d\x18\4\0\0\0size" + zstandard.compress(data),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_container_in_every_compression_reads_as_the_plain_file_does(tmp_path, container, compression):
    plain = CONTAINERS[container]
    records = read(write(tmp_path, plain))
    assert [json.loads(raw.data) for raw in records] == [json.loads(record) for record in RECORDS]
    assert read(write(tmp_path, COMPRESSIONS[compression](plain), "b")) == records
    for raw in records:
        assert isinstance(raw.data, bytes)
        assert plain[raw.byte_offset :].startswith(raw.data)
        assert raw.line == plain.count(b"\n", 0, raw.byte_offset) + 1


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("container", ["lines", "array"])
def test_a_cut_compressed_file_gives_the_records_before_the_cut_and_says_so_once(tmp_path, container, compress):
    rng = random.Random(1)
    many = [b'{"n": "%d"}' % rng.getrandbits(200) for _ in range(30_000)]
    data = b"\n".join(many) if container == "lines" else b"[" + b",\n".join(many) + b"]"
    packed = compress(data)
    *good, bad = read(write(tmp_path, packed[: len(packed) // 2]))
    assert 1000 < len(good) < len(many)
    assert [raw.data for raw in good] == many[: len(good)]
    assert bad.problem is not None
    assert bad.problem[0] == "truncated_compression"


def test_a_damaged_gzip_is_said_to_be_damaged(tmp_path):
    packed = bytearray(gzip.compress(LINES * 100))
    packed[-6] ^= 0xFF
    *good, bad = read(write(tmp_path, bytes(packed)))
    assert len(good) == 5000
    assert bad.problem is not None
    assert "damaged" in bad.problem[1]


@pytest.mark.parametrize("container", ["lines", "array"])
@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_memory_does_not_grow_with_the_file(tmp_path, compress, container):
    texts = random.Random(1).randbytes(5_000_000).hex()
    lines = [f'{{"a": "{texts[at : at + 1000]}"}}' for at in range(0, len(texts), 1000)]
    data = "\n".join(lines) if container == "lines" else "[" + ",\n".join(lines) + "]"
    path = write(tmp_path, compress(data.encode()))
    (source,) = resolve_sources([str(path)])
    (unit,) = plan_units(source.files[0], "a")
    tracemalloc.start()
    try:
        count = sum(1 for _ in UnitReader(unit))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert peak < 5_000_000


def test_text_that_inflates_a_thousandfold_is_read_in_linear_time(tmp_path):
    path = write(tmp_path, zstandard.compress(b'{"a": "%s"}\n' % (b"x" * 1000) * 100_000))
    assert len(read(path)) == 100_000


ROWS = [
    {"messages": [{"role": "user", "content": "007"}], "when": None},
    {"messages": [{"role": "assistant", "content": "2024-01-01"}], "when": 3},
]


def test_parquet_rows_come_as_dicts_with_their_row_as_line(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS * 1500), tmp_path / "a.parquet", row_group_size=700)
    records = read(tmp_path / "a.parquet")
    assert [raw.data for raw in records] == ROWS * 1500
    assert [(raw.line, raw.byte_offset) for raw in records] == [(number, -1) for number in range(1, 3001)]


def test_a_compressed_parquet_is_read_and_a_cut_one_is_named(tmp_path):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    packed = gzip.compress(out.getvalue())
    assert [record.data for record in read(write(tmp_path, packed, "a.parquet.gz"))] == ROWS
    with pytest.raises(DataError, match=r"cut\.parquet\.gz"):
        read(write(tmp_path, packed[:-20], "cut.parquet.gz"))


def test_a_parquet_row_that_is_no_utf8_is_bad_alone(tmp_path):
    raw = pa.array([b"good", b"\xff", b"good too"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    first, second, third = read(tmp_path / "a.parquet")
    assert (first.data, third.data) == ({"text": "good"}, {"text": "good too"})
    assert second.problem is not None
    assert (second.line, second.problem[0]) == (2, "invalid_utf8")


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:4] + bytes(100)])
def test_a_corrupt_parquet_is_named(tmp_path, damage):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    with pytest.raises(DataError, match=r"broken\.parquet"):
        read(write(tmp_path, damage(out.getvalue()), "broken.parquet"))


def test_urls_read_as_files_do():
    system = fsspec.filesystem("memory")
    system.pipe({"/reader/a.jsonl": LINES, "/reader/b.json": CONTAINERS["array"]})
    try:
        assert [raw.data for raw in read("memory://reader/a.jsonl")] == RECORDS
        assert [raw.data for raw in read("memory://reader/b.json")] == RECORDS
    finally:
        system.rm("/reader", recursive=True)
