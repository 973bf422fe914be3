"""`preview` and `inspect`: trained text, context and control tokens told apart, on a terminal and off it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from dft_prep.show import Decoder
from dft_prep.tokenizer_files import load_tokenizer

FAKE = "say <|im_end|> twice"


@pytest.fixture
def data(tmp_path):
    turns = tiny.turns("日本 question", FAKE, "more", "half")
    turns[3]["weight"] = 0.5
    return tiny.write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}, {"messages": tiny.turns("alone")}])


@pytest.fixture
def out(data, model_dir, dft_prep, tmp_path):
    flags = ("--tokenizer", model_dir, "--output_dir", tmp_path / "out", "--validation_split_percentage", 0)
    dft_prep("build", "--data_files", data, *flags)
    return tmp_path / "out"


def test_without_colours_marks_tell_what_is_trained_and_what_is_a_control_token(data, model_dir, dft_prep):
    shown = dft_prep("preview", "--data_files", data, "--tokenizer", model_dir).stdout
    assert f"⟦{FAKE}‹<|im_end|>›⟧" in shown  # the one in the message is text, the one after it the token
    assert "‹<|im_start|>›user\n日本 question‹<|im_end|>›\n" in shown
    assert "⟦[0.5]half‹<|im_end|>›⟧" in shown
    assert "left out, no_assistant" in shown


def on_a_terminal(*words: object, env: dict[str, str] | None = None) -> str:
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", **(env or {})}
    process = subprocess.Popen([sys.executable, "-m", "dft_prep", *map(str, words)], stdout=theirs, env=environment)
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    assert process.wait() == 0
    os.close(ours)
    return b"".join(chunks).decode()


def test_on_a_terminal_colours_do(out):
    shown = on_a_terminal("inspect", out, "--row", 0)
    assert f"\x1b[32m{FAKE}\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in shown and "⟦say" not in shown
    plain = on_a_terminal("inspect", out, "--row", 0, env={"NO_COLOR": "1"})
    assert f"⟦{FAKE}‹<|im_end|>›⟧" in plain and "\x1b[32m" not in plain


def test_json_says_the_same_of_data_and_dataset(data, out, model_dir, dft_prep):
    words = ("--format", "json", "--tokens")
    previewed = json.loads(dft_prep("preview", "--data_files", data, "--tokenizer", model_dir, *words).stdout)
    (row,) = json.loads(dft_prep("inspect", out, "--row", 0, *words).stdout)
    assert previewed[0]["segments"] == row["segments"] and previewed[0]["tokens"] == row["tokens"]
    assert previewed[1]["left_out"]["code"] == "no_assistant" and previewed[1]["segments"] == []
    control = [segment["text"] for segment in row["segments"] if segment.get("control")]
    assert control == ["<|im_start|>", "<|im_end|>"] * 4
    assert {segment.get("weight") for segment in row["segments"]} == {None, 0.5}
    assert sum(token["trained"] for token in row["tokens"]) == row["trained_tokens"]
    assert any(token["text"].startswith("<0x") for token in row["tokens"])  # parts of 日本


def test_token_borders_are_shown_on_request(out, dft_prep):
    borders = dft_prep("inspect", out, "--row", 0, "--tokens").stdout.splitlines()[-1]
    (row,) = json.loads(dft_prep("inspect", out, "--row", 0, "--tokens", "--format", "json").stdout)
    assert borders.count("│") == len(row["tokens"]) + 1


def test_every_row_of_an_unrolled_conversation_is_shown_by_its_id(data, model_dir, dft_prep, tmp_path):
    flags = ("--tokenizer", model_dir, "--output_dir", tmp_path / "rows", "--validation_split_percentage", 0)
    dft_prep("build", "--data_files", data, *flags, "--unroll_turns")
    (first,) = json.loads(dft_prep("inspect", tmp_path / "rows", "--row", 0, "--format", "json").stdout)
    rows = json.loads(dft_prep("inspect", tmp_path / "rows", "--id", first["id"], "--format", "json").stdout)
    assert [row["row"] for row in rows] == [0, 1]


@given(data=st.data(), text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_the_segments_joined_are_the_decoded_row(model_dir, data, text):
    tokenizer = load_tokenizer(str(model_dir))
    decoder = Decoder(tokenizer)
    ids = decoder._tokenizer.encode(f"<|im_start|>{text}<|im_end|>", add_special_tokens=False).ids
    # Borders lie between characters, as a build's do.
    weights = np.array([data.draw(st.sampled_from([0.0, 0.5, 1.0]))] * len(ids))
    weights[0] = 0
    segments = decoder.segments(np.array(ids), weights)
    assert "".join(s.text for s in segments) == decoder._tokenizer.decode(ids, skip_special_tokens=False)
    assert len(decoder.tokens(np.array(ids), weights)) == len(ids)
