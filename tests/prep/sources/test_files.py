from __future__ import annotations

import copy
import gzip
import io
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dft_common.errors import SetupError
from dft_prep.sources import files
from dft_prep.sources.files import FileError
from dft_prep.sources.named import SourceFile, resolve_sources
from dft_prep.sources.readers import FileNote, RawRecord, UnitReader
from dft_prep.sources.units import plan_units
from dft_prep.validate.command import ValidateOptions, run_validate

GOOD = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
RNG = random.Random(1)
LINES = b"".join(b'{"n": %d, "text": "%s"}\n' % (n, RNG.randbytes(20).hex().encode()) for n in range(5000))
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": zstandard.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
}


def source_file(path: Path) -> SourceFile:
    (source,) = resolve_sources([str(path)])
    return source.files[0]


def read(path: Path) -> tuple[list[RawRecord], list[FileNote]]:
    records: list[RawRecord] = []
    notes: list[FileNote] = []
    for unit in plan_units(source_file(path), "a"):
        reader = UnitReader(unit)
        records += reader
        notes += reader.notes
    return records, notes


def refusal(path: Path) -> FileError:
    with pytest.raises(FileError) as raised:
        read(path)
    assert path.name in raised.value.message
    assert raised.value.remedy
    return raised.value


@pytest.fixture
def write(tmp_path):
    def make(data: bytes, name: str = "a.jsonl") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return make


# -- xz (gzip and zstd: test_readers) ----------------------------------------------------------------------------

XZ = {
    "whole": lzma.compress(LINES, preset=0),
    "several streams": lzma.compress(LINES[:999], preset=0) + lzma.compress(LINES[999:], preset=0),
    "padding": lzma.compress(LINES, preset=0) + bytes(8),
    "padding between streams": lzma.compress(LINES[:999], preset=0) + bytes(40_000) + lzma.compress(LINES[999:]),
    "an empty stream": lzma.compress(b"") + lzma.compress(LINES, preset=0),
}


@pytest.mark.parametrize("name", XZ)
def test_xz_reads_as_the_plain_file_does(write, name):
    assert read(write(XZ[name], "a.jsonl.xz")) == read(write(LINES))


@pytest.mark.parametrize("name", ["cut", "damaged", "cut between streams", "text behind it"])
def test_a_broken_xz_gives_what_came_before_and_says_so_once(write, name):
    packed = bytearray(XZ["whole"])
    if name == "damaged":
        packed[len(packed) // 2] ^= 0xFF
    elif name == "text behind it":
        packed += b"this is text, not xz"
    elif name == "cut between streams":
        packed += packed[:20]
    else:
        del packed[len(packed) // 2 :]
    *good, bad = read(write(packed, "a.jsonl.xz"))[0]
    assert len(good) > 100
    assert [raw.data for raw in good] == LINES.split(b"\n")[: len(good)]
    assert bad.problem is not None
    assert (bad.problem[0], bad.cut) == ("truncated_compression", True)
    assert ("cut" if name.startswith("cut") else "damaged") in bad.problem[1]


# -- what grows beyond measure -----------------------------------------------------------------------------------

TEXT = b'{"a": "%s"}\n' % (b"x" * 90)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz"])
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_a_file_that_unpacks_beyond_all_measure_is_stopped(write, monkeypatch, compression, kind):
    monkeypatch.setattr(files, "_GROWTH_FROM", 1 << 20)
    monkeypatch.setattr(files, "_GROWTH", 50)
    text = TEXT if kind == "lines" else b"[" + TEXT.rstrip() + b"," + TEXT.replace(b"\n", b",") * 2
    packed = COMPRESS[compression](text * 30_000)
    found = refusal(write(packed, "bomb.json.xx"))
    assert found.code == "decompression_bomb"
    assert "50 times" in found.message


def test_text_that_repeats_itself_is_none(write, monkeypatch):
    """It is small, or it unpacks to no more than some hundred times its size."""
    assert len(read(write(gzip.compress(TEXT * 100_000), "small.gz"))[0]) == 100_000
    monkeypatch.setattr(files, "_GROWTH_FROM", 1 << 20)
    log = b"".join(b'{"time": %d, "text": "%s"}\n' % (n, b"the server is well and idle " * 20) for n in range(20_000))
    packed = gzip.compress(log)
    assert 50 < len(log) / len(packed) < 500
    assert len(read(write(packed, "log.gz"))[0]) == 20_000


def test_a_real_bomb_is_stopped_after_its_first_part(write):
    member = gzip.compress((b'{"a": "' + b"0" * 1_000_000 + b'"}\n') * 8)
    (unit,) = plan_units(source_file(write(member * 1250, "bomb.jsonl.gz")), "a")
    reader = UnitReader(unit)
    with pytest.raises(FileError, match="256 MiB"):
        assert sum(len(raw.data) for raw in reader) < 10_000_000_000
    assert reader.passed < unit.size // 10


@pytest.mark.parametrize(("rows", "size"), [(1, 1_000_000), (3000, 1000)], ids=["one text", "a text in every row"])
def test_a_parquet_that_unpacks_beyond_all_measure_is_stopped(write, monkeypatch, rows, size):
    """A text that stands in every row is held once: the file's own numbers do not tell how large it will be."""
    monkeypatch.setattr(files, "_GROWTH", 5)
    out = io.BytesIO()
    pq.write_table(pa.table({"a": ["x" * size] * rows}), out, compression="zstd")
    path = write(out.getvalue(), "a.parquet")
    assert len(read(path)[0]) == rows
    monkeypatch.setattr(files, "_GROWTH_FROM", 1000)
    assert refusal(path).code == "decompression_bomb"


# -- what changes, or cannot be opened ---------------------------------------------------------------------------


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(GOOD)


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    shutil.copy2(path, other)
    other.replace(path)


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


CHANGES = {
    "appended to": append,
    "truncated": lambda path: os.truncate(path, 100),
    "replaced": replace,
    "written again": rewrite,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_file_that_changes_while_it_is_read_is_told(write, change, compression):
    path = write(COMPRESS[compression](LINES))
    (unit,) = plan_units(source_file(path), "a")
    records = iter(UnitReader(unit))
    next(records)
    CHANGES[change](path)
    with pytest.raises(FileError) as raised:
        list(records)
    assert raised.value.code == "file_changed"
    with pytest.raises(FileError) as raised:
        next(iter(UnitReader(unit)))
    assert raised.value.code == "file_changed"


def test_a_file_that_vanishes_is_told(write):
    path = write(LINES)
    file = source_file(path)
    (unit,) = plan_units(file, "a")
    path.unlink()
    for attempt in (lambda: plan_units(file, "a"), lambda: list(UnitReader(unit))):
        with pytest.raises(FileError) as raised:
            attempt()
        assert raised.value.code == "unreadable_file"
        assert "No such file" in raised.value.message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_told(write):
    path = write(LINES)
    path.chmod(0)
    assert refusal(path).code == "unreadable_file"


def test_a_link_to_itself_is_told(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    found = refusal(tmp_path / "loop.jsonl")
    assert found.code == "unreadable_file"
    assert "symbolic links" in found.message


def test_a_directory_where_a_file_was_is_told(write, tmp_path):
    file = source_file(write(LINES))
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(FileError, match="directory") as raised:
        plan_units(file, "a")
    assert raised.value.code == "unreadable_file"


# -- names -------------------------------------------------------------------------------------------------------


def test_a_glob_takes_no_directory_for_a_file(write, tmp_path):
    write(LINES)
    (tmp_path / "b.jsonl").mkdir()
    (source,) = resolve_sources([str(tmp_path / "*.jsonl")])
    assert [file.relative for file in source.files] == ["a.jsonl"]


def test_a_pipe_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(SetupError, match="not a regular file"):
            resolve_sources([str(path)])


@pytest.mark.parametrize("name", ["two\nlines.jsonl", "--max_errors=0.jsonl", "\x1b[2Jclear.jsonl", "a b'c\".jsonl"])
def test_a_file_may_have_any_name_and_steers_no_terminal(write, tmp_path, monkeypatch, capsys, name):
    write(GOOD + b"\noops\n", name)
    monkeypatch.chdir(tmp_path)
    for argument in (f"./{name}", "*.jsonl", f"s=./{name}"):
        assert run_validate(ValidateOptions(data_files=(argument,))) == 1
        said = capsys.readouterr()
        assert "invalid_json" in said.out
        assert "\x1b" not in said.out + said.err
        assert "two\nlines" not in said.out + said.err
        run_validate(ValidateOptions(data_files=(argument,), format="json"))
        (finding,) = json.loads(capsys.readouterr().out)["findings"]
        assert (finding["file"], finding["line"]) == (name, 2)


def test_a_tilde_is_the_home_folder_whatever_stands_before_it(write, tmp_path, monkeypatch):
    write(LINES)
    monkeypatch.setenv("HOME", str(tmp_path))
    for argument in ("~/a.jsonl", "chat=~/a.jsonl", {"path": "~/*.jsonl"}, {"path": "~"}):
        (source,) = resolve_sources([argument])
        assert [file.path for file in source.files] == [str(tmp_path / "a.jsonl")]
    with pytest.raises(SetupError, match="no such file"):
        resolve_sources(["~no-such-user/a.jsonl"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    write(LINES, "~/a.jsonl")
    assert [file.path for file in resolve_sources(["~/a.jsonl"])[0].files] == ["~/a.jsonl"]


# -- Parquet ------------------------------------------------------------------------------------------------------


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"text": f"{n} of them"} for n in range(1000)]), out)
    return out.getvalue()


CORRUPT: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-8],
    "head alone": lambda data: data[:4],
    "a hole in its pages": lambda data: data[:10] + bytes(500) + data[510:],
    "a hole in its footer": lambda data: data[:-200] + bytes(150) + data[-50:],
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_parquet_is_named(write, name):
    found = refusal(write(CORRUPT[name](parquet()), "a.parquet"))
    assert found.code == "corrupt_parquet"


# -- other people's drivers --------------------------------------------------------------------------------------


class OddFile(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= OddSystem.breaks_at:
            raise KeyError("token")
        return super().read(min(size or -1, 1 << 16))


class OddSystem(fsspec.AbstractFileSystem):
    protocol = "odd"
    breaks_at = 0

    def info(self, path, **options):
        if "listing" in path:
            raise RuntimeError("")
        return {"name": path, "size": len(LINES), "type": "file"}

    def glob(self, path, maxdepth=None, **options):
        return [path] if self.info(path) else []

    def _open(self, path, mode="rb", block_size=None, autocommit=True, cache_options=None, **options) -> Any:
        if "opening" in path:
            raise ZeroDivisionError("division \x1b[2J by zero")
        return OddFile(LINES)


@pytest.fixture
def odd_system(monkeypatch):
    fsspec.register_implementation("odd", OddSystem, clobber=True)
    monkeypatch.setattr(OddSystem, "breaks_at", 1 << 60)
    return OddSystem


def test_odd_errors_of_a_driver_become_ours(odd_system, monkeypatch):
    with pytest.raises(SetupError, match="RuntimeError"):
        resolve_sources(["odd://listing/a.jsonl"])
    (file,) = resolve_sources(["odd://opening/a.jsonl"])[0].files
    with pytest.raises(FileError, match="division"):
        plan_units(file, "a")
    (file,) = resolve_sources(["odd://reading/a.jsonl"])[0].files
    (unit,) = plan_units(file, "a")
    assert sum(1 for _ in UnitReader(unit)) == 5000
    monkeypatch.setattr(odd_system, "breaks_at", 200_000)
    with pytest.raises(FileError, match="token") as raised:
        list(UnitReader(unit))
    assert raised.value.code == "unreadable_file"
    monkeypatch.setattr(odd_system, "breaks_at", 0)
    with pytest.raises(FileError, match="token"):
        plan_units(file, "a")


def test_a_refusal_survives_its_way_between_processes():
    again = copy.copy(FileError("utf16", "a.jsonl: wide", remedy="convert it"))
    assert (again.code, again.message, again.remedy) == ("utf16", "a.jsonl: wide", "convert it")
