"""Each bad input tried as a new user would: one clear message, the right exit code, no traceback, nothing half-made."""

from __future__ import annotations

import gzip
import json

import pytest

import tiny

GOOD = json.dumps({"messages": tiny.turns("q", "a")}).encode()

# name -> (file name, its bytes, exit code, what the message must say). The file stands alone: nothing good beside it.
FILES = {
    "an empty file": ("a.jsonl", b"", 1, "no record"),
    "only blank lines": ("a.jsonl", b"\n\n \n", 1, "no record"),
    "a picture": ("a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), 1, "a.jsonl"),
    "a zip": ("a.json", b"PK\x03\x04" + bytes(300), 1, "a.json"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), 1, "UTF-16"),
    "plain text": ("a.jsonl", b"hello there\nhow are you\n", 1, "a.jsonl"),
    "a corrupt parquet": ("a.parquet", b"PAR1" + bytes(100), 1, "a.parquet"),
    "a cut gzip": ("a.jsonl.gz", gzip.compress(GOOD + b"\n")[:-12], 1, "truncated_compression"),
    "no assistant": ("a.jsonl", b'{"messages": [{"role": "user", "content": "q"}]}\n', 1, "no_assistant"),
    "an unknown role": ("a.jsonl", b'{"messages": [{"role": "asistant", "content": "q"}]}\n', 1, "unknown_role"),
    "content null": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]}\n',
        1,
        "null_content",
    ),
    "a cut line": ("a.jsonl", GOOD[:-5], 1, "a.jsonl"),
    "an unknown shape": ("a.jsonl", b'{"foo": 1}\n', 1, "unknown_shape"),
    "a number": ("a.jsonl", b'{"messages": 5}\n', 1, ""),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_alone_fails_with_its_reason(name, model_dir, dft_prep, tmp_path):
    file, data, code, message = FILES[name]
    (tmp_path / file).write_bytes(data)
    done = dft_prep("build", "--data_files", file, "--tokenizer", model_dir, "--output_dir", "out", check=code)
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert "what to do:" in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


BAD_LINES = {
    "no_assistant": b'{"messages": [{"role": "user", "content": "q"}]}',
    "unknown_role": b'{"messages": [{"role": "user", "content": "q"}, {"role": "asistant", "content": "q"}]}',
    "null_content": b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]}',
    "invalid_json": b'{"messages": [}',
    "invalid_utf8": b'{"messages": [{"role": "user", "content": "\xff"}, {"role": "assistant", "content": "a"}]}',
    "cut_line": GOOD[:-7],
}


@pytest.mark.parametrize("code", BAD_LINES)
def test_a_bad_record_among_good_ones_goes_to_the_quarantine_with_its_place(code, model_dir, dft_prep, tmp_path):
    before, after = [GOOD.replace(b'"a"', b'"%d"' % i) for i in range(5)], [GOOD]
    lines = [*before, BAD_LINES[code]] if code == "cut_line" else [*before, BAD_LINES[code], *after]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + (b"" if code == "cut_line" else b"\n"))
    dft_prep("build", "--data_files", "a.jsonl", "--tokenizer", model_dir, "--output_dir", "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["left_out"] == {code: 1}
    assert manifest["counts"]["kept"] == len(lines) - 1
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["file"], entry["line"], entry["code"]) == ("a.jsonl", 6, code)
    assert entry["byte_offset"] == sum(len(line) + 1 for line in before)
    assert entry["message"] and entry["help"]
    assert "raw" in entry or "raw_base64" in entry


USAGE = {
    "no such file": (["--data_files", "nowhere.jsonl"], "nowhere.jsonl"),
    "an empty glob": (["--data_files", "x*.jsonl"], "x*.jsonl"),
    "an empty directory": (["--data_files", "empty"], "empty"),
    "no data files": ([], "--data_files"),
    "an unknown flag": (["--data_files", "good.jsonl", "--max_lenght", "5"], "--max_length"),
    "a wrong choice": (["--data_files", "good.jsonl", "--overlong", "cut"], "truncate"),
    "no such tokenizer": (["--data_files", "good.jsonl", "--tokenizer", "./nowhere"], "nowhere"),
    "a shard size": (["--data_files", "good.jsonl", "--shard_size", "big"], "--shard_size"),
    "a date": (["--data_files", "good.jsonl", "--template_date", "today"], "--template_date"),
    "a template": (["--data_files", "good.jsonl", "--chat_template", "none.jinja"], "none.jinja"),
    "a broken template": (["--data_files", "good.jsonl", "--chat_template", "bad.jinja"], "line 1"),
}


@pytest.mark.parametrize("name", USAGE)
def test_bad_usage_exits_2_and_says_what_to_do(name, model_dir, dft_prep, tmp_path):
    words, message = USAGE[name]
    (tmp_path / "good.jsonl").write_bytes(GOOD + b"\n")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "empty").mkdir()
    if "--tokenizer" not in words:
        words = [*words, "--tokenizer", model_dir]
    done = dft_prep("build", *words, "--output_dir", "out", check=2)
    assert message in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("command", ["inspect", "verify", "pack"])
def test_what_is_no_dataset_is_said_to_be_none(command, dft_prep, tmp_path):
    (tmp_path / "dir").mkdir()
    for name, message in (("nowhere", "no such dataset"), ("dir", "no manifest.json")):
        done = dft_prep(command, name, check=1)
        assert message in done.stderr
        assert "dft-prep build" in done.stderr


def test_a_full_disk_says_so_and_leaves_nothing_complete(model_dir, tmp_path):
    resource = pytest.importorskip("resource")
    import subprocess
    import sys

    tiny.write_jsonl(tmp_path / "a.jsonl", tiny.numbered(3000))
    program = tmp_path / "full.py"
    # A write that fails as on a full disk: the real error number, at a real write.
    program.write_text(
        "import errno, sys\n"
        "from dft_prep.shards import writer as shards\n"
        "def full(self, data): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "shards._HashingFile.write = full\n"
        "from dft_prep.cli import main\n"
        "sys.exit(main())\n"
    )
    words = ["build", "--data_files", "a.jsonl", "--tokenizer", str(model_dir), "--output_dir", "out"]
    done = subprocess.run([sys.executable, program, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert resource and done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
