"""`validate` and `build` say the same of every file: what one calls good the other takes, what one refuses the other
leaves out at the same place for the same reason."""

from __future__ import annotations

import gzip
import io
import json
import lzma

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import tiny
from dft_common.errors import DataError
from dft_prep.codes.examples import EXAMPLES
from dft_prep.codes.table import CODES
from dft_prep.pipeline.build import build
from dft_prep.recipe import BuildOptions
from dft_prep.validate.command import ValidateOptions, run_validate

GOOD = [json.dumps(record).encode() for record in tiny.numbered(3)]
LINES = b"\n".join(GOOD) + b"\n"


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([*tiny.numbered(3), {"messages": tiny.turns("nobody answers")}]), out)
    return out.getvalue()


def with_lines(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in [GOOD[0], *lines, GOOD[1], GOOD[2]])


EXAMPLE_LINES = [EXAMPLES[name].bad.encode() for name, code in CODES.items() if code.scope in ("record", "rule")]
FIXTURES: dict[str, tuple[str, bytes]] = {
    "every example": ("a.jsonl", with_lines(*EXAMPLE_LINES)),
    "every repaired example": ("a.jsonl", with_lines(*(EXAMPLES[name].repaired.encode() for name in CODES))),
    "bytes": (
        "a.jsonl",
        with_lines(b"\xff", b"{", b"\0\0", b"[]", b"", b"  ", b'{"a": NaN}', b'"x"', b"\xef\xbb\xbf{}"),
    ),
    "CRLF and BOM": ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
    "a cut end": ("a.jsonl", LINES[:-20]),
    "an array": ("a.json", b"[" + b",".join([*GOOD, b"7", b'{"messages": []}', *EXAMPLE_LINES[-5:]]) + b"]"),
    "a damaged array": ("a.json", b"[" + GOOD[0] + b',\n{"messages": [},\n' + GOOD[1] + b",\n" + GOOD[2]),
    "an array in a .jsonl": ("a.jsonl", b"[" + GOOD[0] + b"]"),
    "lines in a .json": ("a.json", LINES),
    "indented objects": ("a.json", b"\n".join(json.dumps(record, indent=1).encode() for record in tiny.numbered(3))),
    "gzip": ("a.jsonl.gz", gzip.compress(with_lines(b"oops"))),
    "a cut gzip": ("a.jsonl.gz", gzip.compress(LINES * 50)[:-15]),
    "a cut xz": ("a.jsonl.xz", lzma.compress(LINES * 500)[:-40]),
    "zstd": ("a.jsonl.zst", zstandard.compress(with_lines(b"oops"))),
    "Parquet": ("a.parquet", parquet()),
    "a cut Parquet": ("a.parquet", parquet()[:-9]),
    "a picture": ("a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(50)),
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16")),
    "nothing": ("a.jsonl", b""),
    "a conversation twice": ("a.jsonl", LINES + LINES),
}
SETTINGS = {
    "as coded": {},
    "strict rules": {"error": ("no_reply_at_end", "empty_reply", "users_in_a_row", "control_token_in_text")},
    "lax rules": {"ignore": ("repeated_reply", "arguments_misfit", "duplicate_keys")},
    "without tokens in text": {"special_tokens_in_text": "quarantine", "unsupported_tools": "quarantine"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.write_tokenizer(tmp_path_factory.mktemp("model")))


def built(path, model, out, settings) -> tuple[list, int] | DataError:
    """(what a build left out, how many conversations it took), or the error that ended it."""
    options = BuildOptions(
        data_files=(str(path),),
        tokenizer=model,
        output_dir=str(out),
        max_bad_fraction=1,
        max_bad_records=10**9,
        encoder="tokenizers",
        **settings,
    )
    try:
        build(options)
    except DataError as error:
        if not (out / "quarantine.jsonl").exists():
            return error
        return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()], 0
    counts = msgspec.json.decode((out / "manifest.json").read_bytes())["counts"]
    left_out = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    return left_out, counts["kept"] + counts["duplicates"]


# Severities concern records alone.
CASES = [(name, settings) for name in FIXTURES for settings in SETTINGS if settings == "as coded" or "every" in name]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_validate_and_build_never_disagree(tmp_path, capsys, model, name, settings):
    file, data = FIXTURES[name]
    (tmp_path / file).write_bytes(data)
    flags = SETTINGS[settings]
    run_validate(
        ValidateOptions(data_files=(str(tmp_path / file),), tokenizer=model, format="json", max_errors=999, **flags)
    )
    said = json.loads(capsys.readouterr().out)
    errors = [finding for finding in said["findings"] if finding["severity"] == "error"]
    outcome = built(tmp_path / file, model, tmp_path / "out", flags)
    if isinstance(outcome, DataError):
        # The file as a whole: one finding, and the same words.
        assert [CODES[finding["code"]].scope for finding in errors] == ["file"]
        assert errors[0]["message"] in outcome.message
        return
    left_out, kept = outcome
    place = ("file", "line", "column", "byte_offset", "code", "severity", "path", "message", "help")
    assert [[entry[key] for key in place] for entry in left_out] == [[entry[key] for key in place] for entry in errors]
    assert said["summary"]["good"] == kept
    assert said["summary"]["records"] == kept + len(left_out)
    if name == "every example" and settings == "as coded":
        assert len(left_out) > 25


def test_the_first_bad_record_stops_a_build_that_should(tmp_path, model):
    (tmp_path / "a.jsonl").write_bytes(with_lines(b"oops", b"oops again"))
    options = BuildOptions(
        data_files=(str(tmp_path),), tokenizer=model, output_dir=str(tmp_path / "out"), on_error="stop"
    )
    with pytest.raises(DataError) as stopped:
        build(options)
    assert f"{tmp_path / 'a.jsonl'}:2:1: invalid_json" in stopped.value.message
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_is_in_a_benchmark_is_left_out_and_counted(tmp_path, model):
    question = "A farmer has three fields and each field has seven rows of nine apple trees in it"
    (tmp_path / "a.jsonl").write_bytes(LINES + json.dumps({"messages": tiny.turns(question, "189")}).encode() + b"\n")
    (tmp_path / "benchmark.txt").write_text(f"Question: {question.upper()}, how many trees?\n")
    left_out, kept = built(
        tmp_path / "a.jsonl", model, tmp_path / "out", {"decontaminate": (str(tmp_path / "benchmark.txt"),)}
    )
    assert [(entry["code"], entry["line"], entry["path"]) for entry in left_out] == [
        ("contaminated", 4, "$.messages[0].content")
    ]
    assert kept == 3
    recipe = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert recipe["decontaminate"]
