"""The seventeen small corpora on which other tools' masks were measured: each right, or left out by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dft_common.flags import run_command
from dft_common.manifest import read_manifest
from dft_common.packs import PackIndex, list_pack_indexes
from dft_common.reader import SplitReader
from dft_prep.cli import cli

SHARED = Path(__file__).resolve().parents[3] / "shared"
MAKE = SHARED / "peers" / "make_check.py"
NAMES = (
    "basic", "space", "empty_assistant", "inject_end", "inject_user", "two_assistants", "two_users", "ends_user",
    "starts_assistant", "mid_system", "no_assistant", "system_only_assistant", "weight0", "extra_keys", "null_content",
    "tool_role", "long",
)  # fmt: skip
LEFT_OUT = {"no_assistant": {"no_assistant": 1}, "null_content": {"null_content": 1}}
END = "<|im_end|>"

pytestmark = pytest.mark.skipif(not MAKE.is_file(), reason="the shared corpora are not here")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpora")
    subprocess.run([sys.executable, MAKE, directory], check=True)
    assert sorted(path.stem for path in directory.iterdir()) == sorted(NAMES)
    return directory


def build(corpus: Path, tokenizer: str, out: Path, *more: object) -> None:
    words = ["build", "--data_files", corpus, "--tokenizer", SHARED / "tokenizers" / tokenizer, "--output_dir", out]
    limits = ["--max_bad_fraction", 1, "--validation_split_percentage", 0, "--preprocessing_num_workers", 1]
    assert run_command(cli, "dft-prep", [str(word) for word in (*words, *limits, *more)]) == 0


def runs(ids: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("tokenizer", ["phi2-chatml", "falcon-chatml"])
@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_is_trained_as_written_or_left_out_by_name(name, tokenizer, corpora, tmp_path):
    build(corpora / f"{name}.jsonl", tokenizer, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.counts.left_out == LEFT_OUT.get(name, {})
    assert manifest.counts.duplicates == 2  # each corpus ends in the same conversation three times
    records = [
        json.loads(line)["messages"] for line in (corpora / f"{name}.jsonl").read_text("utf-8").split("\n") if line
    ]
    kept = [m for m in records[: len(records) - 2] if is_good(m)]
    library = Tokenizer.from_file(str(SHARED / "tokenizers" / tokenizer / "tokenizer.json"))
    end = library.token_to_id(END)
    reader = SplitReader(tmp_path / "out", "train", manifest)
    assert len(reader) == len(kept)
    for number, messages in enumerate(kept):
        row = reader.row(number)
        decoded = library.decode(row.input_ids.tolist(), skip_special_tokens=False)
        assert decoded == "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in messages)
        assert Counter(row.input_ids.tolist())[end] == len(messages)  # none is made of a message's text
        trained = runs(row.input_ids, row.assistant_masks)
        assert all(run.count(end) == 1 and run[-1] == end for run in trained)
        texts = [library.decode(run, skip_special_tokens=False) for run in trained]
        assert texts == [f"{m['content']}{END}" for m in messages if m["role"] == "assistant" and m.get("weight", 1)]


def is_good(messages: list[dict]) -> bool:
    replies = [message for message in messages if message["role"] == "assistant"]
    return bool(replies) and all(message["content"] is not None for message in replies)


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_a_long_conversation_is_cut_where_something_is_trained(overlong, corpora, tmp_path):
    build(corpora / "long.jsonl", "phi2-chatml", tmp_path / "out", "--max_length", 900, "--overlong", overlong)
    manifest = read_manifest(tmp_path / "out")
    reader = SplitReader(tmp_path / "out", "train", manifest)
    index = PackIndex(tmp_path / "out", list_pack_indexes(tmp_path / "out", "train")[0])
    slices = sorted((piece for pack in range(len(index)) for piece in index[pack]), key=lambda p: (p.row, p.start))
    long = [piece for piece in slices if piece.row == 0]
    row = reader.row(0)
    assert all(piece.end - piece.start <= 900 for piece in long)
    assert all(row.assistant_masks[piece.end - 1] or piece.end == len(row.input_ids) for piece in long)
    assert [(piece.start, piece.end) for piece in long] == {
        "truncate": [(0, 900)],
        "split": [(0, 900), (900, len(row.input_ids))],
    }[overlong]
