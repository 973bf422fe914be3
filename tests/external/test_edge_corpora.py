"""The seventeen small corpora on which other tools' masks were measured: each right, or left out by name.

Every row is taken apart at its control tokens, told by id, and at the borders of what is trained. What comes out has
to be the conversation as the template prints it, the trained part exactly the replies that have a weight and the token
that ends them; and the text of a control token in a message is never that token.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer

from dft_common.flags import run_command
from dft_common.manifest import Manifest, read_manifest
from dft_common.packs import PackIndex, list_pack_indexes
from dft_common.reader import Row, SplitReader
from dft_prep.cli import cli

SHARED = Path(__file__).resolve().parents[3] / "shared"
MAKE = SHARED / "peers" / "make_check.py"
TOKENIZERS = ("phi2-chatml", "falcon-chatml", "phi3-sentencepiece")
NAMES = (
    "basic", "space", "empty_assistant", "inject_end", "inject_user", "two_assistants", "two_users", "ends_user",
    "starts_assistant", "mid_system", "no_assistant", "system_only_assistant", "weight0", "extra_keys", "null_content",
    "tool_role", "long",
)  # fmt: skip
LEFT_OUT = {"no_assistant": "$.messages", "null_content": "$.messages[1].content"}
"""The corpora whose first record is left out, by a code of the corpus's name; and where."""
PAD = "What is 2+2?"

pytestmark = pytest.mark.skipif(not MAKE.is_file(), reason="the shared corpora are not here")


class Piece(NamedTuple):
    """A control token, or a run of text, and whether it is trained."""

    text: str
    control: bool
    trained: bool


class Built(NamedTuple):
    """All corpora in one dataset, each its own source."""

    tokenizer: str
    directory: Path
    manifest: Manifest
    library: Tokenizer
    records: dict[str, list[list[dict]]]
    """The messages of every record, by corpus."""

    def pieces(self, row: Row) -> list[Piece]:
        added = self.library.get_added_tokens_decoder()
        control = {number: token.content for number, token in added.items() if token.special}
        tokens = zip(row.input_ids.tolist(), row.assistant_masks.tolist(), strict=True)
        out = []
        for (is_control, trained), run in groupby(tokens, lambda token: (token[0] in control, token[1])):
            ids = [number for number, _ in run]
            texts = [control[number] for number in ids] if is_control else [self.library.decode(ids)]
            out += [Piece(text, is_control, trained) for text in texts]
        return out

    def expected(self, messages: list[dict]) -> list[Piece]:
        printed = phi3(messages) if self.tokenizer == "phi3-sentencepiece" else chatml(messages)
        return [piece for piece in printed if piece.text]


def is_trained(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) > 0


def chatml(messages: list[dict]) -> Iterator[Piece]:
    for message in messages:
        head, text, trained = f"{message['role']}\n", message["content"], is_trained(message)
        yield Piece("<|im_start|>", True, False)
        if trained:
            yield from [Piece(head, False, False), Piece(text, False, True)]
        else:
            yield Piece(head + text, False, False)
        yield from [Piece("<|im_end|>", True, trained), Piece("\n", False, False)]


def phi3(messages: list[dict]) -> Iterator[Piece]:
    """Its tokens take the white space to their right, but never from a reply; it prints no tool's result."""
    for message in messages:
        if message["role"] != "tool":
            yield Piece(f"<|{message['role']}|>", True, False)
            yield Piece(message["content"], False, is_trained(message))
            yield Piece("<|end|>", True, is_trained(message))
    yield Piece("<|endoftext|>", True, False)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpora")
    subprocess.run([sys.executable, MAKE, directory], check=True)
    assert sorted(path.stem for path in directory.iterdir()) == sorted(NAMES)
    return directory


def run(*words: object) -> None:
    assert run_command(cli, "dft-prep", [str(word) for word in words]) == 0


@pytest.fixture(scope="module", params=TOKENIZERS)
def built(request, corpora, tmp_path_factory) -> Built:
    out = tmp_path_factory.mktemp("datasets") / request.param
    tokenizer = SHARED / "tokenizers" / request.param
    files = [corpora / f"{name}.jsonl" for name in NAMES]
    given = ["--data_files", *files, "--tokenizer", tokenizer, "--output_dir", out]
    run("build", *given, "--max_bad_fraction", 1, "--validation_split_percentage", 0, "--preprocessing_num_workers", 1)
    library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    lines = {path.stem: path.read_text("utf-8").removesuffix("\n").split("\n") for path in files}
    records = {name: [json.loads(line)["messages"] for line in texts] for name, texts in lines.items()}
    return Built(request.param, out, read_manifest(out), library, records)


def test_every_record_is_kept_left_out_by_name_or_a_duplicate(built):
    first = built.manifest.sources[0].name
    assert {source.name for source in built.manifest.sources} == set(NAMES)
    for source in built.manifest.sources:
        counts, records = source.counts, built.records[source.name]
        assert counts.read == len(records) == counts.kept + counts.duplicates + sum(counts.left_out.values())
        assert counts.left_out == ({source.name: 1} if source.name in LEFT_OUT else {})
        # Every corpus ends in the same conversation three times; that is kept once of them all.
        assert records[-1] == records[-2] == records[-3] and records[-1][0]["content"] == PAD
        assert counts.duplicates == (2 if source.name == first else 3)
    lines = (built.directory / "quarantine.jsonl").read_text("utf-8").splitlines()
    found = {(Path(f["file"]).stem, f["line"], f["code"], f["path"]) for f in map(json.loads, lines)}
    assert len(lines) == len(LEFT_OUT) and found == {(name, 1, name, path) for name, path in LEFT_OUT.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_corpus_is_trained_as_written(built, name):
    reader = SplitReader(built.directory, "train", built.manifest)
    rows = [row for row in map(reader.row, range(len(reader))) if row.source == name]
    wanted = [] if name in LEFT_OUT else built.records[name][:-3]
    if name == built.manifest.sources[0].name:
        wanted = [*wanted, built.records[name][-1]]
    assert [built.pieces(row) for row in rows] == [built.expected(messages) for messages in wanted]
    assert all(row.loss_weights is None for row in rows)


@pytest.mark.parametrize("limit", ["in the reply", "in the header after it"])
@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_no_slice_of_a_long_conversation_ends_in_a_cut_header(built, overlong, limit):
    reader = SplitReader(built.directory, "train", built.manifest)
    number = next(number for number in range(len(reader)) if reader.row(number).source == "long")
    row = reader.row(number)
    mask, length = row.assistant_masks, len(row.input_ids)
    ends = (np.flatnonzero(np.diff(mask.astype(int)) == -1) + 1).tolist()  # of its two replies
    assert len(ends) == 2 and ends[0] > 512 and length > ends[0] + 2
    max_length = 512 if limit == "in the reply" else ends[0] + 2
    run("pack", built.directory, "--max_length", max_length, "--overlong", overlong)
    infos = list_pack_indexes(built.directory, "train")
    info = next(info for info in infos if (info.max_length, info.overlong) == (max_length, overlong))
    index = PackIndex(built.directory, info)
    packs = [index[pack] for pack in range(len(index))]
    assert all(sum(piece.end - piece.start for piece in pack) <= max_length for pack in packs)
    slices = sorted(piece for pack in packs for piece in pack)
    assert {piece.row for piece in slices} == set(range(len(reader)))
    labels = 0
    for piece in slices:
        part, whole = reader.row(piece.row, piece.start, piece.end), reader.row(piece.row)
        assert part.input_ids.tolist() == whole.input_ids[piece.start : piece.end].tolist()
        assert piece.live == part.assistant_masks[1:].sum() > 0
        assert part.assistant_masks[-1] or piece.end == len(whole.input_ids)
        labels += piece.live if piece.row == number else 0
    cuts = [max_length, ends[0]] if max_length == 512 else [ends[0]]
    if length - 512 <= max_length:
        cuts = cuts[:1]  # the rest of the row fits into one slice
    wanted = [0, *cuts, length] if overlong == "split" else [0, cuts[0]]
    assert [(s.start, s.end) for s in slices if s.row == number] == list(pairwise(wanted))
    lost = {name: (lost.tokens, lost.trained_tokens) for name, lost in info.lost.items()}
    unseen = (length - wanted[-1], int(mask.sum()) - labels)
    assert lost == ({"long": unseen} if any(unseen) else {})
