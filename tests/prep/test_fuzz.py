"""Damaged files: never a crash, every record accounted for, and what is left out can be had back from the quarantine.

DFT_FUZZ_CASES sets how many files are tried (2,000; `make fuzz` tries 100,000).
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import lzma
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import tiny
import wild
from dft_common.errors import DataError
from dft_common.records import Finding
from dft_prep.judge.judgement import Judge, Judged, quarantine_line
from dft_prep.sources.files import FileError
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import plan_units
from dft_prep.validate.command import ValidateOptions, run_validate

CASES = int(os.environ.get("DFT_FUZZ_CASES", "2000"))
BATCHES = 20


def records() -> list[dict]:
    made = [record(f"q {name}", reply) for name, record in wild.FORMATS.items() for reply in wild.REPLIES[:3]]
    return [*tiny.numbered(3), *made, {"messages": tiny.turns("q", "a"), "meta": {"a": [1, {"b": None}]}, "n": 1.5e9}]


RECORDS = records()
LINES = "".join(
    json.dumps(record, ensure_ascii=number % 2 == 0) + "\n" for number, record in enumerate(RECORDS)
).encode()
ARRAY = json.dumps(RECORDS[:20], indent=1, ensure_ascii=False).encode()
FLAT = b"[" + b", ".join(json.dumps(record).encode() for record in RECORDS[20:40]) + b"]"
OBJECTS = "\n".join(json.dumps(record, indent=2) for record in RECORDS[:12]).encode()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(tiny.numbered(30)), out)
    return out.getvalue()


FILES: dict[str, bytes] = {
    "a.jsonl": LINES,
    "b.jsonl": LINES.replace(b"\n", b"\r\n"),
    "c.json": ARRAY,
    "d.json": FLAT,
    "e.json": OBJECTS,
    "f.jsonl.gz": gzip.compress(LINES, mtime=0),
    "g.json.zst": zstandard.compress(ARRAY),
    "h.jsonl.xz": lzma.compress(LINES[:3000]),
    "i.parquet": parquet(),
}
# What damage often looks like, and what parsers often trip over.
PIECES = [
    *(
        b"\n",
        b"\r\n",
        b"\0",
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
    ),
    *(
        b"\\u",
        b"\\ud800",
        b"NaN",
        b"1e999",
        b"null",
        b"//",
        b'{"messages":',
        b'"role"',
        b"<|im_end|>",
        b"\x1b[2J",
        b"  ",
    ),
    *(b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b'"content": 7, ', b'"content": "x", ', b"\xed\xa0\x80", b"\x1f\x8b"),
]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """`data` after one to four accidents."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, other = chance.randrange(len(out) + 1), chance.randrange(len(out) + 1)
        accident = chance.randrange(7)
        if accident == 0 and at < len(out):
            out[at] ^= 1 << chance.randrange(8)
        elif accident == 1:
            del out[at : at + chance.choice((1, 1, 2, 17, 400))]
        elif accident == 2:
            out[at:at] = chance.choice(PIECES)
        elif accident == 3:
            del out[at:]
        elif accident == 4:
            out[at:at] = out[other : other + chance.choice((1, 30, 700))]
        elif accident == 5:
            out[at : at + len(PIECES[0])] = chance.choice(PIECES)
        else:
            del out[: min(at, 200)]
    return bytes(out)


def recovered(line: bytes) -> bytes:
    entry = json.loads(line)
    return base64.b64decode(entry["raw_base64"]) if "raw_base64" in entry else entry["raw"].encode()


def try_file(path, data: bytes) -> None:
    path.write_bytes(data)
    (source,) = resolve_sources([str(path)])
    try:
        (unit,) = plan_units(source.files[0], source.name)
        judge = Judge(path.name)
        read = kept = left_out = 0
        plain = unit.compression == "none" and unit.kind != "parquet"
        for raw in UnitReader(unit):
            read += 1
            judged = judge(raw)
            if isinstance(judged, Judged):
                kept += 1
                continue
            left_out += 1
            assert isinstance(judged, Finding)
            assert judged.line >= 1 and judged.column >= 1 and judged.message and judged.help
            if isinstance(raw.data, bytes):
                back = recovered(quarantine_line(judged, raw))
                assert back == raw.data
                assert not plain or data[judged.byte_offset :].startswith(back)
        judge.field_counts()
        assert read == kept + left_out
    except DataError as error:
        assert isinstance(error, FileError)
        assert error.message and error.remedy


@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_damage_crashes_or_loses_a_record(tmp_path, batch):
    chance = random.Random(f"{batch} of {CASES}")
    for number in range(CASES // BATCHES):
        name = chance.choice(list(FILES))
        data = damaged(FILES[name], chance)
        try:
            try_file(tmp_path / f"{number}-{name}", data)
        except BaseException:
            kept = tmp_path / f"failed-{name}"
            kept.write_bytes(data)
            print(f"the file is kept: {kept}")
            raise


def test_a_validation_of_damaged_files_ends_with_its_summary(tmp_path, capsys):
    chance = random.Random(0)
    for number in range(60):
        name = chance.choice(list(FILES))
        (tmp_path / f"{number}-{name}").write_bytes(damaged(FILES[name], chance))
    code = run_validate(ValidateOptions(data_files=(str(tmp_path),), format="json", max_errors=10**6))
    said = json.loads(capsys.readouterr().out)
    files = {finding["file"] for finding in said["findings"] if finding["severity"] == "error"}
    assert code == 1 and len(files) > 20
    assert said["summary"]["records"] >= said["summary"]["good"] > 500
