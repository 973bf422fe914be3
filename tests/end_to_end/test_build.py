"""`dft-prep build` as its user runs it: what comes out, and what a killed or repeated build leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tiny
from dft_common.manifest import read_manifest
from dft_common.packs import PackIndex, list_pack_indexes
from dft_common.reader import SplitReader

VOLATILE = {"report.json"}
SMALL_UNITS = """
import sys
from dft_prep.pipeline import engine
from dft_prep.sources import units
units.UNIT_BYTES = 20_000
engine._POOL_FROM_BYTES = 0
from dft_prep.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of a dataset but those that hold times."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in VOLATILE
    }


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    good = tiny.numbered(1500)
    bad = [{"messages": tiny.turns("nobody answers")}, {"messages": [{"role": "bot", "content": "x"}]}]
    first = tiny.write_jsonl(tmp_path / "data" / "first.jsonl", [*good[:700], *bad, *good[700:1000], good[3]])
    second = tmp_path / "data" / "second.json"
    second.write_text(json.dumps([{"conversations": [
        {"from": "human", "value": record["messages"][0]["content"]},
        {"from": "gpt", "value": record["messages"][1]["content"]},
    ]} for record in [*good[1000:], good[5]]], indent=1))  # fmt: skip
    return [first, second]


@pytest.fixture
def small_units(tmp_path) -> Path:
    """A program that is dft-prep with work units of 20 kB, so that a small corpus has many."""
    path = tmp_path / "small_units.py"
    path.write_text(SMALL_UNITS)
    return path


def build_words(corpus, model_dir, out, *more) -> list[str]:
    words = [
        "build",
        "--data_files",
        *corpus,
        "--tokenizer",
        model_dir,
        "--output_dir",
        out,
        "--max_length",
        256,
        *more,
    ]
    return [str(word) for word in words]


def test_counts_add_up_and_each_reply_is_there(corpus, model_dir, dft_prep, tmp_path):
    out = tmp_path / "out"
    done = dft_prep(*build_words(corpus, model_dir, out))
    assert done.stdout.strip() == str(out)
    manifest = read_manifest(out)
    counts = manifest.counts
    assert (counts.read, counts.kept, counts.duplicates) == (1504, 1500, 2)
    assert counts.left_out == {"no_assistant": 1, "unknown_role": 1}
    entries = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["code"]) for entry in entries] == [(701, "no_assistant"), (702, "unknown_role")]
    lines = corpus[0].read_bytes().splitlines(keepends=True)
    assert entries[0]["byte_offset"] == sum(len(line) for line in lines[:700])
    assert json.loads(entries[1]["raw"]) == {"messages": [{"role": "bot", "content": "x"}]}
    replies = set()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    for split in manifest.splits:
        reader = SplitReader(out, split, manifest)
        for number in range(len(reader)):
            row = reader.row(number)
            live = row.input_ids[row.assistant_masks].tolist()
            replies.add(tokenizer.decode(live, skip_special_tokens=False))
    assert replies == {record["messages"][1]["content"] + "<|im_end|>" for record in tiny.numbered(1500)}


def test_datasets_opens_it(corpus, model_dir, dft_prep, tmp_path):
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "out"
    for percentage, expected in ((50, None), (0, 0)):
        dft_prep(*build_words(corpus, model_dir, out, "--validation_split_percentage", percentage, "--overwrite"))
        loaded = datasets.load_from_disk(str(out))
        manifest = read_manifest(out)
        assert {split: len(rows) for split, rows in loaded.items()} == {s: i.rows for s, i in manifest.splits.items()}
        if expected is not None:
            assert len(loaded["validation"]) == expected
        row, ours = loaded["train"][7], SplitReader(out, "train").row(7)
        assert row["input_ids"] == ours.input_ids.tolist()
        assert row["assistant_masks"] == ours.assistant_masks.tolist()
        assert (row["id"], row["source"]) == (ours.id, ours.source)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_do_not_depend_on_the_workers(corpus, model_dir, small_units, tmp_path, workers):
    plain, other = tmp_path / "plain", tmp_path / "other"
    words = build_words(corpus, model_dir, plain)
    subprocess.run([sys.executable, "-m", "dft_prep", *words], check=True, capture_output=True)
    words = build_words(corpus, model_dir, other, "--preprocessing_num_workers", workers)
    subprocess.run([sys.executable, small_units, *words], check=True, capture_output=True)
    first, second = tree(plain), tree(other)
    # The unit size is ours, not the user's: it may show in the hashes of the sources, nowhere in the data.
    for files in (first, second):
        manifest = json.loads(files.pop("manifest.json"))
        assert manifest["splits"]
    assert first == second


def test_two_workers_give_the_bytes_of_one(corpus, model_dir, small_units, tmp_path):
    trees = []
    for workers in (1, 2):
        words = build_words(corpus, model_dir, tmp_path / f"out{workers}", "--preprocessing_num_workers", workers)
        subprocess.run([sys.executable, small_units, *words], check=True, capture_output=True)
        trees.append(tree(tmp_path / f"out{workers}"))
    assert trees[0] == trees[1]


def test_a_killed_build_looks_incomplete_and_goes_on(corpus, model_dir, small_units, tmp_path, dft_prep):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, str(small_units)]
    subprocess.run([*command, *build_words(corpus, model_dir, whole)], check=True, capture_output=True)
    process = subprocess.Popen([*command, *build_words(corpus, model_dir, killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((killed / ".work" / "parts").glob("*.json"))) < 3:
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists()
    assert "no manifest.json" in dft_prep("verify", killed, check=1).stderr
    again = subprocess.run(
        [*command, *build_words(corpus, model_dir, killed)], check=True, capture_output=True, text=True
    )
    assert "work units were finished already" in again.stderr
    assert tree(killed) == tree(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_exits_130_and_leaves_nothing_complete(corpus, model_dir, small_units, tmp_path, workers):
    out = tmp_path / "out"
    words = build_words(corpus, model_dir, out, "--preprocessing_num_workers", workers)
    process = subprocess.Popen(
        [sys.executable, small_units, *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list((out / ".work" / "parts").glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (out / "manifest.json").exists()


def test_the_same_again_is_up_to_date_and_another_recipe_needs_overwrite(corpus, model_dir, dft_prep, tmp_path):
    out = tmp_path / "out"
    dft_prep(*build_words(corpus, model_dir, out))
    before = tree(out)
    assert "up to date" in dft_prep(*build_words(corpus, model_dir, out)).stderr
    refused = dft_prep(*build_words(corpus, model_dir, out, "--seed", 7), check=2)
    assert "seed" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert tree(out) == before
    with corpus[0].open("a") as file:
        file.write(json.dumps({"messages": tiny.turns("a new", "one")}) + "\n")
    assert "source files have changed" in dft_prep(*build_words(corpus, model_dir, out), check=2).stderr
    dft_prep(*build_words(corpus, model_dir, out, "--overwrite"))
    assert read_manifest(out).counts.kept == 1501
    assert not (out / ".work").exists()


def test_a_damaged_manifest_is_said_to_be_damaged_and_can_be_replaced(corpus, model_dir, dft_prep, tmp_path):
    out = tmp_path / "out"
    dft_prep(*build_words(corpus, model_dir, out))
    whole = (out / "manifest.json").read_bytes()
    (out / "manifest.json").write_bytes(whole[:200])
    assert "damaged" in dft_prep(*build_words(corpus, model_dir, out), check=1).stderr
    dft_prep(*build_words(corpus, model_dir, out, "--overwrite"))
    assert (out / "manifest.json").read_bytes() == whole


def test_a_directory_with_other_files_is_not_touched(corpus, model_dir, dft_prep, tmp_path):
    out = tmp_path / "precious"
    for name in ("thesis.tex", "train/notes.txt"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("x")
        assert "files that are no dataset's" in dft_prep(*build_words(corpus, model_dir, out), check=2).stderr
        assert [path.name for path in out.rglob("*") if path.is_file()] == [Path(name).name]
        shutil.rmtree(out)


def test_too_many_bad_records_fail_with_their_reasons_and_no_manifest(model_dir, dft_prep, tmp_path):
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [*tiny.numbered(50), *[{"messages": []}] * 20])
    out = tmp_path / "out"
    done = dft_prep(*build_words([bad], model_dir, out), check=1)
    assert "20 of 70 records are bad" in done.stderr
    assert not (out / "manifest.json").exists()
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 20
    dft_prep(*build_words([bad], model_dir, out, "--max_bad_records", 20))
    empty = tiny.write_jsonl(tmp_path / "all_bad.jsonl", [{"messages": []}])
    assert "no record was kept" in dft_prep(*build_words([empty], model_dir, tmp_path / "o"), check=1).stderr


def test_on_error_stop_names_the_record(model_dir, dft_prep, tmp_path):
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [*tiny.numbered(3), {"messages": []}])
    done = dft_prep(*build_words([bad], model_dir, tmp_path / "out", "--on_error", "stop"), check=1)
    assert "bad.jsonl" in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_size_on_disk(model_dir, dft_prep, tmp_path):
    source = tiny.write_jsonl(tmp_path / "twenty-letters-long0.jsonl", tiny.numbered(12_000))
    out = tmp_path / "out"
    dft_prep(*build_words([source], model_dir, out))
    counts = read_manifest(out).counts
    size = sum(path.stat().st_size for path in out.rglob("*.arrow") if "packs" not in path.parts)
    assert size <= 4.125 * counts.tokens + 64 * counts.kept


def test_small_shards_and_uint16(corpus, model_dir, dft_prep, tmp_path):
    out, reference = tmp_path / "out", tmp_path / "reference"
    dft_prep(*build_words(corpus, model_dir, reference))
    dft_prep(*build_words(corpus, model_dir, out, "--shard_size", "20KB", "--token_dtype", "uint16"))
    manifest = read_manifest(out)
    assert len(manifest.splits["train"].shards) > 1
    dft_prep("verify", out)
    ours, theirs = SplitReader(out, "train"), SplitReader(reference, "train")
    assert ours.row(0).input_ids.dtype == np.uint16
    for number in (0, 5, len(ours) - 1):
        assert ours.row(number).input_ids.tolist() == theirs.row(number).input_ids.tolist()


def test_pack_makes_another_index_without_touching_the_rows(corpus, model_dir, dft_prep, tmp_path):
    out = tmp_path / "out"
    dft_prep(*build_words(corpus, model_dir, out))
    before = {name: data for name, data in tree(out).items() if not name.startswith("packs")}
    dft_prep("pack", out, "--max_length", 64, "--overlong", "split")
    assert {name: data for name, data in tree(out).items() if not name.startswith("packs")} == before
    infos = {info.max_length: info for info in list_pack_indexes(out, "train")}
    assert set(infos) == {64, 256}
    assert (PackIndex(out, infos[64]).token_counts() <= 64).all()
    dft_prep("verify", out)


def test_verify_finds_a_changed_byte_anywhere(corpus, model_dir, dft_prep, tmp_path):
    out = tmp_path / "out"
    dft_prep(*build_words(corpus, model_dir, out))
    dft_prep("verify", out)
    files = [path for path in out.rglob("*") if path.suffix == ".arrow" or path.name == "tokenizer.json"]
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        assert dft_prep("verify", out, check=1).stdout, path
        path.write_bytes(data)
    dft_prep("verify", out)
    shutil.rmtree(out / "validation")
    assert "missing" in dft_prep("verify", out, check=1).stdout


def test_inspect_and_preview_show_what_is_trained(corpus, model_dir, dft_prep, tmp_path):
    out = tmp_path / "out"
    shown = dft_prep("preview", "--data_files", *corpus, "--tokenizer", model_dir, "-n", 2).stdout
    assert "⟦0 + 1 = 1‹<|im_end|>›⟧" in shown
    dft_prep(*build_words(corpus, model_dir, out))
    assert "1,500" in dft_prep("inspect", out).stdout
    row = json.loads(dft_prep("inspect", out, "--row", 3, "--format", "json").stdout)[0]
    trained = "".join(segment["text"] for segment in row["segments"] if segment["trained"])
    assert trained.startswith("3 + 1 = 4") and trained.endswith("<|im_end|>")
    same = json.loads(dft_prep("inspect", out, "--id", row["id"], "--format", "json").stdout)[0]
    assert same == row
    pack = json.loads(dft_prep("inspect", out, "--pack", 0, "--format", "json").stdout)
    assert len(pack) > 1
    assert sum(item["tokens"] for item in pack) <= 256


def test_text_from_the_data_cannot_reach_the_terminal_raw(model_dir, dft_prep, tmp_path):
    source = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": tiny.turns("\x1b[2Jhi", "\x1b]0;pwned\x07")}])
    out = dft_prep("preview", "--data_files", source, "--tokenizer", model_dir).stdout
    assert "\x1b" not in out
    assert "\\x1b]0;pwned" in out


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "datasets", "deepspeed", "accelerate"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from dft_prep.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


def test_preparation_needs_nothing_of_the_trainer(corpus, model_dir, tmp_path):
    program = tmp_path / "blocked.py"
    program.write_text(BLOCKED)
    out = tmp_path / "out"
    for words in (build_words(corpus, model_dir, out), ["verify", str(out)], ["inspect", str(out)]):
        subprocess.run([sys.executable, program, *words], check=True, capture_output=True)
    assert read_manifest(out).counts.kept == 1500
