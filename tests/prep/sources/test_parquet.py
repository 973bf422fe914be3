"""Rows of Parquet: whatever their columns hold, and in little memory however much a small file unpacks to."""

from __future__ import annotations

import datetime
import io
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dft_prep.sources import files, parquet
from dft_prep.sources.files import FileError
from dft_prep.sources.named import SourceFile, resolve_sources
from dft_prep.sources.parquet import parquet_rows


@pytest.fixture
def write(tmp_path):
    def make(table: pa.Table, **options) -> SourceFile:
        pq.write_table(table, tmp_path / "a.parquet", **options)
        (source,) = resolve_sources([str(tmp_path / "a.parquet")])
        return source.files[0]

    return make


BEYOND = 1 << 60  # microseconds: some 36,000 years
TIMES = {
    "a column": pa.array([BEYOND, 1], pa.timestamp("us")),
    "a date": pa.array([1 << 30, 1], pa.date32()),
    "in a struct": pa.array([{"t": BEYOND}, {"t": 1}], pa.struct([("t", pa.timestamp("us"))])),
    "in a list": pa.array([[1, BEYOND], []], pa.list_(pa.timestamp("us"))),
    "in a map": pa.array([[("k", BEYOND)], []], pa.map_(pa.string(), pa.timestamp("us"))),
}
FOUND = {
    "a column": BEYOND,
    "a date": 1 << 30,
    "in a struct": {"t": BEYOND},
    "in a list": [datetime.datetime(1970, 1, 1, 0, 0, 0, 1), BEYOND],
    "in a map": [{"key": "k", "value": BEYOND}],
}


@pytest.mark.parametrize("name", TIMES)
def test_a_time_that_python_cannot_hold_costs_no_record(write, name):
    file = write(pa.table({"text": ["007", "2024-01-01"], "x": TIMES[name]}))
    first, second = parquet_rows(file, "none")
    assert first == {"text": "007", "x": FOUND[name]}
    assert isinstance(second, dict)
    assert second["text"] == "2024-01-01"


def test_a_name_of_a_column_that_is_no_utf8_is_a_finding(tmp_path):
    out = io.BytesIO()
    pq.write_table(pa.table({"name": ["x"]}), out)
    (tmp_path / "a.parquet").write_bytes(out.getvalue().replace(b"name", b"na\xffe"))
    (source,) = resolve_sources([str(tmp_path / "a.parquet")])
    with pytest.raises(FileError) as raised:
        list(parquet_rows(source.files[0], "none"))
    assert raised.value.code == "corrupt_parquet"


def test_a_text_that_a_dictionary_holds_once_for_many_rows_is_a_bomb_all_the_same(write, monkeypatch):
    monkeypatch.setattr(files, "_GROWTH_FROM", 4 << 20)
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 1 << 20)
    file = write(pa.table({"text": ["x" * 20_000] * 500}), compression="zstd")
    assert file.size < 10_000
    rows = parquet_rows(file, "none")
    assert isinstance(next(rows), dict)
    with pytest.raises(FileError) as raised:
        list(rows)
    assert raised.value.code == "decompression_bomb"


@pytest.mark.parametrize("row_group_size", [100, 700, 10_000])
def test_long_rows_come_in_small_batches_and_every_row_once(write, monkeypatch, row_group_size):
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 100_000)
    texts = [f"{number} ".ljust(2000) for number in range(2000)]
    file = write(pa.table({"text": texts}), row_group_size=row_group_size)
    tracemalloc.start()
    try:
        found = [row["text"][:8].split()[0] for row in parquet_rows(file, "none") if isinstance(row, dict)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [str(number) for number in range(2000)]
    assert peak < 1_500_000
