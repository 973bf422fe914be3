"""Records that are too large to be held, and those that the end of a compressed stream cuts: each costs itself alone,
and the quarantine keeps its beginning."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from dft_common.records import Finding
from dft_prep.judge.judgement import Judge, Judged, quarantine_line
from dft_prep.sources import readers, units
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import RawRecord, UnitReader
from dft_prep.sources.units import plan_units

HEAD = b'{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "'
END = b'"}]}'
GOOD = [HEAD % number + b"a" + END for number in range(4)]
LARGEST, KEPT = 3000, 100
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": zstandard.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
}


def record(size: int) -> bytes:
    """A good record of `size` bytes."""
    head = HEAD % 9
    return head + b"x" * (size - len(head) - len(END)) + END


def read(path: Path) -> list[RawRecord]:
    """The records of a file, their lines counted through all of its units."""
    (source,) = resolve_sources([str(path)])
    found, lines = [], 0
    for unit in plan_units(source.files[0], source.name):
        reader = UnitReader(unit)
        found += [msgspec.structs.replace(raw, line=lines + raw.line) for raw in reader]
        lines += reader.lines
    return found


def data_of(raw: RawRecord) -> bytes:
    assert isinstance(raw.data, bytes)
    return raw.data


def values(raws: list[RawRecord]) -> list:
    assert not any(raw.problem for raw in raws)
    return [json.loads(data_of(raw)) for raw in raws]


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_RECORD", LARGEST)
    monkeypatch.setattr(readers, "KEPT_OF_LARGE", KEPT)
    monkeypatch.setattr(readers, "_CHUNK", 500)  # below the limit, as it is in earnest


CONTAINERS: dict[str, Callable[[list[bytes]], bytes]] = {
    "lines": lambda records: b"\n".join(records) + b"\n",
    "lines without the last newline": b"\n".join,
    "array": lambda records: b"[\n" + b",\n".join(records) + b"\n]\n",
    "array on a line": lambda records: b"[" + b",".join(records) + b"]",
    "objects": lambda records: b"\n".join(record.replace(b": ", b":\n", 1) for record in records),
}


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_record_that_is_too_large_costs_itself_alone(tmp_path, small_limits, place, container, compression):
    records = [*GOOD[:place], record(LARGEST + 1), *GOOD[place:]]
    data = CONTAINERS[container](records)
    (tmp_path / "a.x").write_bytes(COMPRESS[compression](data))
    found = read(tmp_path / "a.x")
    bad = found.pop(place)
    assert values(found) == [json.loads(good) for good in GOOD]
    assert bad.problem is not None
    assert bad.problem[0] == "record_too_large"
    assert f"{LARGEST + 1:,} bytes" in bad.problem[1]
    assert bad.data == data[bad.byte_offset :][:KEPT]
    assert bad.line == data.count(b"\n", 0, bad.byte_offset) + 1


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_record_at_the_limit_is_read(tmp_path, small_limits, container):
    records = [GOOD[0], record(LARGEST), GOOD[1], record(LARGEST)]
    (tmp_path / "a.x").write_bytes(CONTAINERS[container](records))
    assert values(read(tmp_path / "a.x")) == [json.loads(each) for each in records]


def test_a_line_far_longer_than_a_unit_belongs_to_the_unit_in_which_it_begins(tmp_path, monkeypatch, small_limits):
    monkeypatch.setattr(units, "UNIT_BYTES", 500)
    records = [GOOD[0], record(10 * LARGEST), GOOD[1], GOOD[2]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(records))
    found = read(tmp_path / "a.jsonl")
    assert [(raw.line, raw.problem and raw.problem[0]) for raw in found] == [
        (1, None),
        (2, "record_too_large"),
        (3, None),
        (4, None),
    ]


def test_it_is_left_out_with_its_beginning(tmp_path, small_limits):
    large = record(LARGEST + 1)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD[0], large, GOOD[1]]))
    judge = Judge("a.jsonl")
    raws = read(tmp_path / "a.jsonl")
    first, bad, last = map(judge, raws)
    assert isinstance(first, Judged) and isinstance(last, Judged)
    assert isinstance(bad, Finding)
    assert json.loads(quarantine_line(bad, raws[1]))["raw"].encode() == large[:KEPT]


@pytest.mark.parametrize("container", ["lines", "array"])
def test_little_memory_is_taken_for_it(tmp_path, small_limits, container):
    data = CONTAINERS[container]([GOOD[0], record(4_000_000), GOOD[1]])
    (tmp_path / "a.json").write_bytes(data)
    tracemalloc.start()
    try:
        assert len(read(tmp_path / "a.json")) == 3
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


# -- a compressed stream that ends too early ---------------------------------------------------------------------

RNG = random.Random(1)
UNPACK: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "zstd": zstandard.ZstdDecompressor().decompressobj,
    "xz": lzma.LZMADecompressor,
}
MANY = [b'{"n": %d, "text": "%s"}' % (n, RNG.randbytes(100).hex().encode()) for n in range(2000)]


@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz"])
@pytest.mark.parametrize("container", ["lines", "array", "array on a line", "objects"])
def test_what_was_read_of_the_record_that_was_cut_is_kept(tmp_path, compression, container):
    data = CONTAINERS[container](MANY)
    packed = COMPRESS[compression](data)
    packed = packed[: len(packed) * 2 // 3]
    (tmp_path / "a.x").write_bytes(packed)
    *good, bad = read(tmp_path / "a.x")
    assert 100 < len(good) < len(MANY)
    assert values(good) == [json.loads(each) for each in MANY[: len(good)]]
    assert bad.problem is not None
    assert (bad.problem[0], bad.cut) == ("truncated_compression", True)
    # All that comes out of the stream, and nothing between it and the last good record is lost.
    assert data_of(bad) == UNPACK[compression]().decompress(packed)[bad.byte_offset :].rstrip(b",\n") != b""
    between = data[good[-1].byte_offset + len(data_of(good[-1])) : bad.byte_offset]
    assert between.strip(b" ,\n") == b""
    finding = Judge("a.x")(bad)
    assert isinstance(finding, Finding)
    assert json.loads(quarantine_line(finding, bad))["raw"].encode() == bad.data


@pytest.mark.parametrize(
    ("packed", "at"),
    [
        (gzip.compress(b"\n".join(MANY), mtime=0), -8),
        (zstandard.ZstdCompressor(write_checksum=True).compress(b"\n".join(MANY)), -1),
        (lzma.compress(b"\n".join(MANY), preset=0), -40),
    ],
    ids=["gzip", "zstd", "xz"],
)
def test_a_checksum_that_does_not_fit_puts_the_records_before_it_in_doubt(tmp_path, packed, at):
    damaged = bytearray(packed)
    damaged[at] ^= 0x55
    (tmp_path / "a.x").write_bytes(damaged)
    *good, bad = read(tmp_path / "a.x")
    assert values(good) == [json.loads(each) for each in MANY[: len(good)]]
    assert bad.problem is not None
    assert bad.problem[0] == "truncated_compression"
    assert "records before this place may be damaged too" in bad.problem[1]
