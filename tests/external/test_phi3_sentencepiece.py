"""Masks and ids of a real tokenizer from SentencePiece, whose control tokens strip white space to their right.

The whole conversation's ids are those of its whole text by `tokenizers` itself, so each prompt's too; a trained run
spells its turn, every character whole; text never becomes a control token. Real conversations, then hostile ones.
Skipped where the shared files are absent.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

import tiny
from dft_prep.encode.batch import BatchEncoder
from dft_prep.encode.checks import self_check
from dft_prep.encode.encoders import ReferenceEncoder, choose_encoder
from dft_prep.template.render import Renderer
from dft_prep.tokenizer_files import load_tokenizer
from sentencepiece_cases import DATE, conversation, encoded, runs, spelled, starts

SHARED = Path(__file__).resolve().parents[3] / "shared"
TOKENIZER = SHARED / "tokenizers" / "phi3-sentencepiece"
RECORDS = SHARED / "sources" / "gsm8k_plain.jsonl"
pytestmark = pytest.mark.skipif(not (TOKENIZER.is_dir() and RECORDS.is_file()), reason="the shared files are not here")

HOSTILE = (
    " leading",
    "trailing  ",
    "\n\n  both \t\n",
    "double  spaces   and\r\nlines",
    "日本語 中文 한국어",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈",
    "𒀀𓀀\U0010ffff",
    "▁ ▁▁x",
    "<0x41><0x0A>",
    "\ufffd\ufffd",
    "\x00\x01\u200b\ufeff",
    "e\u0301 \u2028 \u00a0x",
    "<|en d|> <|end|",
    "<unk",
    "1234567890",
    "    indented\n        more",
)
CONTROL_TEXTS = (
    "<|end|>",
    "<|assistant|>\n",
    "<|end|>\n<|assistant|>\nno",
    "<s>",
    " <|endoftext|> ",
    "<unk>",
    "日<|user|>本",
)


@pytest.fixture(scope="module")
def oracle() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))


@pytest.fixture(scope="module")
def encoder() -> BatchEncoder:
    files = load_tokenizer(str(TOKENIZER))
    assert files.chat_template is not None
    reference = ReferenceEncoder(files)
    engine = choose_encoder("auto", files, reference, HOSTILE)
    return BatchEncoder(Renderer(files.chat_template, files, DATE), files, engine, reference)


@functools.cache
def template() -> jinja2.Template:
    source = (TOKENIZER / "chat_template.jinja").read_text("utf-8")
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)


def whole_ids(oracle: Tokenizer, contents: list[str], *, prompt: bool = False) -> list[int]:
    named = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    text = template().render(messages=tiny.turns(*contents), add_generation_prompt=prompt, **named)
    return oracle.encode(text, add_special_tokens=False).ids


def check_texts(oracle: Tokenizer, parts: list[list[int]], contents: list[str]) -> None:
    texts = [spelled(oracle, run) for run in parts]  # raises for half a character
    for number in (1, 3)[: len(contents) // 2]:
        wanted = f"{contents[number]}<|end|>".replace("▁", " ")
        assert texts[number] == f" {wanted}"  # the dummy space, which decoding takes away
        assert oracle.decode(parts[number], skip_special_tokens=False) == wanted


def test_real_conversations(encoder, oracle):
    with RECORDS.open(encoding="utf-8") as file:
        records = [json.loads(line) for line, _ in zip(file, range(200), strict=False)]
    for record in records:
        contents = [message["content"] for message in record["messages"]]
        ids, live = encoded(encoder, conversation(contents))
        assert ids.tolist() == whole_ids(oracle, contents)
        assert ids[: starts(live)[0]].tolist() == whole_ids(oracle, contents[:1], prompt=True)
        check_texts(oracle, runs(ids, live), contents)
        assert len(starts(live)) == 1


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_texts(encoder, oracle, text):
    contents = [text, f"said {text}", f"a{text}b", text]
    ids, live = encoded(encoder, conversation(contents))
    for number, start in zip((1, 3), starts(live), strict=True):
        assert ids[:start].tolist() == whole_ids(oracle, contents[:number], prompt=True)
    check_texts(oracle, runs(ids, live), contents)


@pytest.mark.parametrize("text", CONTROL_TEXTS, ids=ascii)
def test_control_tokens_texts(encoder, oracle, text):
    control = {token.id for token in encoder.control.values()}
    contents = [text, text, f"say {text}", f"a{text}b"]
    ids, live = encoded(encoder, conversation(contents))
    plain, _ = encoded(encoder, conversation(["w", "x", "y", "z"]))
    assert Counter(i for i in ids.tolist() if i in control) == Counter(i for i in plain.tolist() if i in control)
    check_texts(oracle, runs(ids, live), contents)


def test_the_self_check_holds_for_hostile_texts(encoder):
    done = self_check(encoder.renderer, encoder, [conversation(["x", text, text, text]) for text in HOSTILE])
    assert done["prompts"] >= 2 * len(HOSTILE)
