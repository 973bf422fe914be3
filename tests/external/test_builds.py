"""Seven files by other people and one in every format, three tokenizers: every record is kept or left out for a reason,
every reply is live."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import wild

SHARED = Path(__file__).resolve().parents[3] / "shared"
SOURCES = SHARED / "sources"
TOKENIZERS = (
    "phi2-chatml",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon-chatml", "phi3-sentencepiece")),
)
pytestmark = pytest.mark.skipif(not SOURCES.is_dir(), reason="the shared data is not here")


def records(path: Path) -> list[dict]:
    text = path.read_text("utf-8")
    return (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    )


def replies(record: dict) -> Iterator[str]:
    """What a person would say that this record trains: an oracle of our own, which knows just these files."""
    for message in record.get("messages", []):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            parts = message["content"]
            yield from (part["value"] for part in parts if part["type"] == "tool_call")
            yield "".join(part.get("text") or part.get("value") for part in parts if part["type"] == "text")
    for message in record.get("conversations", []):
        if message["from"] in ("gpt", "function_call"):
            yield message["value"]
    if "instruction" in record:
        yield record.get("output") or record["response"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_every_reply_of_every_source_is_live_verbatim(tokenizer, tmp_path):
    from tokenizers import Tokenizer

    from dft_common.manifest import read_manifest
    from dft_common.reader import SplitReader

    files = sorted(SOURCES.iterdir())
    assert len(files) == 7
    (tmp_path / "wild").mkdir()
    made = wild.write_every_format(tmp_path / "wild")
    files += sorted((tmp_path / "wild").iterdir())
    words = [
        "build",
        "--data_files",
        *files,
        "--tokenizer",
        SHARED / "tokenizers" / tokenizer,
        "--output_dir",
        tmp_path / "out",
    ]
    subprocess.run([sys.executable, "-m", "dft_prep", *map(str, words)], check=True, capture_output=True)
    manifest = read_manifest(tmp_path / "out")
    read = {path.stem: records(path) for path in files}
    for source in manifest.sources:
        counts = source.counts
        assert counts.read == len(read[source.name])
        assert counts.left_out == {}, (source.name, counts.left_out)
    live: set[str] = set()
    joined = []
    decoder = Tokenizer.from_file(str(SHARED / "tokenizers" / tokenizer / "tokenizer.json"))
    for split in manifest.splits:
        reader = SplitReader(tmp_path / "out", split, manifest)
        for number in range(len(reader)):
            row = reader.row(number)
            edges = np.flatnonzero(np.diff(np.concatenate([[0], row.assistant_masks, [0]])))
            runs = [row.input_ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
            texts = decoder.decode_batch(runs, skip_special_tokens=False)
            live.update(text.removesuffix(manifest.template.end_of_turn) for text in texts)
            joined += texts
    everything = "\0".join(joined)
    for name, items in read.items():
        wanted = set(made.get(name) or (reply for record in items for reply in replies(record) if reply))
        assert wanted
        missing = [reply for reply in wanted - live if reply not in everything]
        assert not missing, (name, len(missing), missing[0])
