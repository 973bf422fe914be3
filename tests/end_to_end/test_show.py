"""`preview` and `inspect`: trained text, context and control tokens told apart, on a terminal and off it."""

from __future__ import annotations

import itertools
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers
from tokenizers import decoders as steps

import tiny
from dft_prep.show.printing import Style, lay_out
from dft_prep.show.segments import Decoder, Segment
from dft_prep.tokenizer_files import load_tokenizer

FAKE = "say <|im_end|> twice"


def sentencepiece_tokenizer() -> Tokenizer:
    """A space before every text, other characters as byte tokens, and a decoder that drops the first space."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁▁", "▁a"]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    merges = [("▁", "▁"), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    tokenizer.decoder = steps.Sequence(decoder)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> dict[str, Decoder]:
    kinds = {"byte": tiny.byte_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
    directories = {
        kind: tiny.write_tokenizer(tmp_path_factory.mktemp(kind), tokenizer=tokenizer)
        for kind, tokenizer in kinds.items()
    }
    return {kind: Decoder(load_tokenizer(str(directory))) for kind, directory in directories.items()}


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
    assert shown.startswith("⟦trained⟧ context ‹control token›")
    assert f"⟦{FAKE}‹<|im_end|>›⟧↵\n" in shown  # the one in the message is text, the one after it the token
    assert "‹<|im_start|>›user↵\n日本 question‹<|im_end|>›↵\n" in shown
    assert "⟦0.5▸half‹<|im_end|>›⟧↵\n" in shown
    assert "left out, no_assistant" in shown


def test_newlines_say_whether_they_are_trained(model_dir, dft_prep, tmp_path):
    source = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": tiny.turns("q", "one\n\ntwo")}])
    shown = dft_prep("preview", "--data_files", source, "--tokenizer", model_dir).stdout
    assert "⟦one↵\n↵\ntwo‹<|im_end|>›⟧↵\n" in shown


def test_a_trained_newline_behind_the_end_of_the_turn_would_be_seen():
    """A build never trains one: this is how a reader would find out if it did."""
    segments = [Segment(trained=True, text="<|im_end|>", control=True), Segment(trained=True, text="\n")]
    segments.append(Segment(trained=False, text="<|im_start|>", control=True))
    line = lay_out(segments, [[segment.text] for segment in segments], Style(coloured=False, borders=False))
    assert "".join(text for text, _ in line.runs) == "⟦‹<|im_end|>›↵⟧\n‹<|im_start|>›"


def test_text_in_the_data_cannot_pass_for_marks(model_dir, dft_prep, tmp_path):
    forged = "⟦9▸‹<|im_end|>›⟧↵│"
    source = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": tiny.turns(forged, "reply")}])
    words = ("preview", "--data_files", source, "--tokenizer", model_dir)
    body = dft_prep(*words).stdout.split("\n", 1)[1]
    assert "\\u27e69\\u25b8\\u2039<|im_end|>\\u203a\\u27e7\\u21b5│" in body
    assert (body.count("⟦"), body.count("⟧"), body.count("‹")) == (1, 1, 4)
    segments = json.loads(dft_prep(*words, "--format", "json").stdout)[0]["segments"]
    assert [s["text"] for s in segments if s.get("control")] == ["<|im_start|>", "<|im_end|>"] * 2
    assert forged in segments[1]["text"]


def test_json_holds_nothing_that_a_terminal_obeys(model_dir, dft_prep, tmp_path):
    nasty = "\x1b\x9b\x7f\u202e\u2066"
    source = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": tiny.turns(f"é {nasty}", "reply")}])
    words = ("preview", "--data_files", source, "--tokenizer", model_dir, "--format", "json")
    out = dft_prep(*words).stdout
    assert not set(nasty) & set(out) and "é" in out
    assert f"é {nasty}" in "".join(segment["text"] for segment in json.loads(out)[0]["segments"])


def test_an_output_that_lacks_the_characters_gets_their_escapes(data, model_dir, dft_prep):
    words = ("preview", "--data_files", data, "--tokenizer", model_dir)
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    assert "\\u27e60.5\\u25b8half\\u2039<|im_end|>\\u203a\\u27e7" in dft_prep(*words, env=ascii_only).stdout
    json_words = (*words, "--format", "json")
    assert dft_prep(*json_words, env=ascii_only).stdout == dft_prep(*json_words).stdout


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
    assert f"\x1b[32m{FAKE}\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m\x1b[2m↵\x1b[0m" in shown
    assert "\x1b[1;35m<|im_start|>\x1b[0m\x1b[2muser↵" in shown
    assert "\x1b[4;32mhalf" in shown
    assert not set("⟦⟧‹›") & set(shown)


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colours_gets_the_marks(out, env):
    plain = on_a_terminal("inspect", out, "--row", 0, env=env)
    assert f"⟦{FAKE}‹<|im_end|>›⟧" in plain and "\x1b" not in plain


def test_json_says_the_same_of_data_and_dataset(data, out, model_dir, dft_prep):
    words = ("--format", "json", "--tokens")
    previewed = json.loads(dft_prep("preview", "--data_files", data, "--tokenizer", model_dir, *words).stdout)
    (row,) = json.loads(dft_prep("inspect", out, "--row", 0, *words).stdout)
    assert previewed[0]["segments"] == row["segments"] and previewed[0]["token_list"] == row["token_list"]
    assert previewed[1]["left_out"]["code"] == "no_assistant" and previewed[1]["segments"] == []
    control = [segment["text"] for segment in row["segments"] if segment.get("control")]
    assert control == ["<|im_start|>", "<|im_end|>"] * 4
    assert {segment.get("weight") for segment in row["segments"]} == {None, 0.5}
    assert sum(token["trained"] for token in row["token_list"]) == row["trained_tokens"]
    assert any(token["text"].startswith("<0x") for token in row["token_list"])  # parts of 日本


def test_token_borders_are_shown_on_request(out, dft_prep):
    legend, _, *lines = dft_prep("inspect", out, "--row", 0, "--tokens").stdout.splitlines()
    (row,) = json.loads(dft_prep("inspect", out, "--row", 0, "--tokens", "--format", "json").stdout)
    assert "│ token border" in legend
    assert "".join(lines).count("│") == len(row["token_list"]) - 1
    assert any(line.endswith("│‹<|im_end|>›⟧│↵│") for line in lines)
    assert "│" not in dft_prep("inspect", out, "--row", 0).stdout


def test_every_row_of_an_unrolled_conversation_is_shown_by_its_id(data, model_dir, dft_prep, tmp_path):
    flags = ("--tokenizer", model_dir, "--output_dir", tmp_path / "rows", "--validation_split_percentage", 0)
    dft_prep("build", "--data_files", data, *flags, "--unroll_turns")
    (first,) = json.loads(dft_prep("inspect", tmp_path / "rows", "--row", 0, "--format", "json").stdout)
    rows = json.loads(dft_prep("inspect", tmp_path / "rows", "--id", first["id"], "--format", "json").stdout)
    assert [row["row"] for row in rows] == [0, 1]


TEXTS = st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=12), min_size=1, max_size=5)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@given(texts=TEXTS, data=st.data())
def test_the_segments_joined_are_the_decoded_row(decoders, kind, texts, data):
    """However texts, control tokens and weights follow one another."""
    decoder = decoders[kind]
    ids: list[int] = []
    weights: list[float] = []
    for text in texts:
        start = "<|im_start|>" if data.draw(st.booleans()) else ""
        new = decoder._tokenizer.encode(start + text, add_special_tokens=False).ids
        ids += new
        weights += [data.draw(st.sampled_from([0.0, 0.5, 1.0]))] * len(new)
    row, row_weights = np.array(ids, np.int64), np.array(weights)
    segments = decoder.segments(row, row_weights)
    assert "".join(s.text for s in segments) == decoder._tokenizer.decode(ids, skip_special_tokens=False)
    tokens = decoder.tokens(row, row_weights)
    assert [token.id for token in tokens] == ids
    assert "\ufffd" in "".join(texts) or not any("\ufffd" in token.text for token in tokens)
    edges = decoder.edges(row, row_weights)
    pieces = [[token.text for token in tokens[a:b]] for a, b in itertools.pairwise(edges)]
    line = lay_out(segments, pieces, Style(coloured=False, borders=True))
    assert "".join(text for text, _ in line.runs).count("│") == max(0, len(ids) - 1)


@pytest.mark.parametrize(("kind", "first"), [("byte", [" "]), ("sentencepiece", ["  "])])
def test_a_token_that_is_a_part_of_a_character_shows_its_bytes(decoders, kind, first):
    decoder = decoders[kind]
    ids = np.array(decoder._tokenizer.encode(" 日\n").ids)
    texts = [token.text for token in decoder.tokens(ids, np.zeros(len(ids)))]
    assert texts == [*first, "<0xE6>", "<0x97>", "<0xA5>", "\n"]
