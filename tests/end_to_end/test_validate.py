"""`dft-prep validate` as a CI job runs it, and its agreement with `build`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import tiny

BAD = [
    {"messages": tiny.turns("nobody answers")},
    {"messages": [{"role": "bot", "content": "x"}]},
    {"foo": 1},
    {"messages": [*tiny.turns("q", "a"), {"role": "user", "content": None}]},
]


@pytest.fixture
def mixed(tmp_path):
    records = [*tiny.numbered(20), *BAD[:2], {"messages": tiny.turns("q", "")}, *BAD[2:]]
    path = tiny.write_jsonl(tmp_path / "mixed.jsonl", records)
    path.write_bytes(path.read_bytes() + b'{"messages": [\xff]}\n')
    return path


def test_good_data_exits_0(dft_prep, tmp_path):
    path = tiny.write_jsonl(tmp_path / "good.jsonl", tiny.numbered(30))
    done = dft_prep("validate", "--data_files", path, "--strict")
    assert done.stdout == ""
    assert "30 records, 30 good" in done.stderr


def test_every_finding_has_its_place_and_a_remedy(mixed, dft_prep):
    done = dft_prep("validate", "--data_files", "mixed.jsonl", check=1)
    heads = [line for line in done.stdout.splitlines() if not line.startswith("    ")]
    assert [line.split(" ")[0] for line in heads] == [
        "mixed.jsonl:21:1:",
        "mixed.jsonl:22:1:",
        "mixed.jsonl:23:1:",
        "mixed.jsonl:24:1:",
        "mixed.jsonl:25:1:",
        "mixed.jsonl:26:15:",
    ]
    assert len(done.stdout.splitlines()) == 2 * len(heads), "a remedy each"
    assert "26 records, 21 good" in done.stderr


def test_a_warning_fails_only_when_strict(dft_prep, tmp_path):
    path = tiny.write_jsonl(tmp_path / "warn.jsonl", [{"messages": tiny.turns("q", "a", "and?")}])
    assert "no_reply_at_end" in dft_prep("validate", "--data_files", path).stdout
    dft_prep("validate", "--data_files", path, "--strict", check=1)


def _validate_into(stdout, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dft_prep", "validate", *map(str, words)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_reader_that_leaves_does_not_make_the_data_bad(mixed, tmp_path, format):
    """`dft-prep validate ... | head` exited 1, whatever the data."""
    odd = tiny.write_jsonl(tmp_path / "warn.jsonl", [{"messages": tiny.turns("q", "a", "and?")}])
    for path, code in ((odd, 0), (mixed, 1)):
        reader, writer = os.pipe()
        os.close(reader)
        done = _validate_into(writer, "--data_files", path, "--format", format)
        os.close(writer)
        assert done.returncode == code
        assert " good" in done.stderr
        assert "Traceback" not in done.stderr


def test_json_and_github_formats(mixed, dft_prep, tmp_path):
    done = dft_prep("validate", "--data_files", mixed, "--format", "json", "--output", "found.json", check=1)
    assert done.stdout == ""
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["summary"]["codes"]["no_assistant"] == 1
    keys = {"file", "line", "column", "byte_offset", "code", "severity", "path", "message", "help"}
    assert all(set(finding) == keys for finding in found["findings"])
    lines = mixed.read_bytes().splitlines(keepends=True)
    for finding in found["findings"]:
        assert finding["byte_offset"] == sum(len(line) for line in lines[: finding["line"] - 1])
    annotations = dft_prep("validate", "--data_files", "mixed.jsonl", "--format", "github", check=1).stdout.splitlines()
    assert annotations[0].startswith("::error file=mixed.jsonl,line=21,col=1,title=no_assistant::")
    assert sum(line.startswith("::warning") for line in annotations) == 1


def test_after_max_errors_only_counts(mixed, dft_prep):
    done = dft_prep("validate", "--data_files", mixed, "--max_errors", 2, check=1)
    assert done.stdout.count("mixed.jsonl:") == 2
    assert "4 more findings are not shown" in done.stderr
    assert "invalid_utf8" in done.stderr


def test_it_judges_as_build_does(mixed, model_dir, dft_prep, tmp_path):
    words = ["--data_files", mixed, "--tokenizer", model_dir]
    dft_prep("build", *words, "--output_dir", "out")
    left_out = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["left_out"]
    found = json.loads(dft_prep("validate", *words, "--format", "json", check=1).stdout)
    errors = [finding["code"] for finding in found["findings"] if finding["severity"] == "error"]
    assert {code: errors.count(code) for code in errors} == left_out
    quarantined = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    places = [(entry["line"], entry["column"], entry["code"], entry["path"]) for entry in quarantined]
    assert places == [
        (finding["line"], finding["column"], finding["code"], finding["path"])
        for finding in found["findings"]
        if finding["severity"] == "error"
    ]


def test_with_a_tokenizer_it_finds_refusals_and_lengths(dft_prep, tmp_path):
    model = tiny.write_tokenizer(tmp_path / "model", tiny.INSTRUCT)
    records = [
        {"messages": tiny.turns("q", "a")},
        {"messages": tiny.turns("q", "a", system="s")},
        {"messages": tiny.turns("q", "a " * 200)},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]},
    ]
    tiny.write_jsonl(tmp_path / "a.jsonl", records)
    words = ["--data_files", "a.jsonl", "--tokenizer", model, "--max_length", 100, "--format", "json"]
    found = json.loads(dft_prep("validate", *words, check=1).stdout)
    assert {(finding["line"], finding["code"]) for finding in found["findings"]} == {
        (2, "template_refused"),
        (3, "overlong"),
        (4, "nothing_to_train"),
    }
    assert found["summary"]["tokens"]["longest"] > 100


def test_a_file_that_is_no_chat_data_is_one_finding_among_the_others(mixed, dft_prep, tmp_path):
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n")
    words = ["--data_files", "picture.jsonl", mixed, "--format", "json"]
    found = json.loads(dft_prep("validate", *words, check=1).stdout)["findings"]
    assert [finding["code"] for finding in found][:2] == ["other_kind", "no_assistant"]
    assert "PNG" in found[0]["message"]
