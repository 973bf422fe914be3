"""Tokenizers that came from SentencePiece, each with each of three templates; an oracle for their ids and texts.

For tests/prep/test_sentencepiece*.py and tests/external/test_phi3_sentencepiece.py.
"""

from __future__ import annotations

import datetime
import functools
from typing import NamedTuple

import jinja2
import numpy as np
from tokenizers import Tokenizer

import tiny
from dft_common.records import Conversation, Message
from dft_prep.encode.batch import BatchEncoder
from dft_prep.encode.encoders import ReferenceEncoder
from dft_prep.template.render import Renderer
from dft_prep.tokenizer_files import TokenizerFiles

DATE = datetime.date(2026, 1, 31)
NAMED = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
BYTES = {text: bytes([byte]) for byte, text in enumerate(tiny.BYTE_TOKENS)}
KINDS = {
    "bpe normalizer": ("bpe", "normalizer"),
    "bpe first": ("bpe", "first"),
    "bpe always": ("bpe", "always"),
    "unigram first": ("unigram", "first"),
    "unigram always": ("unigram", "always"),
}


class Case(NamedTuple):
    kind: str
    template: str
    strips_right: bool = False

    def __str__(self) -> str:
        return ", ".join([self.kind, self.template, *["strips right"] * self.strips_right])


CASES = [
    Case(kind, template, strips)
    for kind in KINDS
    for template in ("chatml", "phi", "instruct")
    for strips in (False, True)
]


@functools.cache
def oracle(case: Case) -> Tokenizer:
    return tiny.sentencepiece_tokenizer(*KINDS[case.kind], strips_right=case.strips_right)


def make_encoder(tokenizer: Tokenizer, source: str) -> BatchEncoder:
    """As a build makes it."""
    files = TokenizerFiles(
        origin="tiny", tokenizer_json=tokenizer.to_str(), config=NAMED, chat_template=None, side_files={}
    )
    reference = ReferenceEncoder(files)
    return BatchEncoder(Renderer(source, files, DATE), files, reference, reference)


@functools.cache
def encoder(case: Case) -> BatchEncoder:
    return make_encoder(oracle(case), tiny.TEMPLATES[case.template])


def conversation(contents: list[str], *, trained: tuple[int, ...] = (1, 3)) -> Conversation:
    messages = [
        Message(role=message["role"], content=message["content"], weight=float(number in trained))
        for number, message in enumerate(tiny.turns(*contents))
    ]
    return Conversation(messages=tuple(messages))


@functools.cache
def compiled(source: str) -> jinja2.Template:
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)


def whole_ids(case: Case, contents: list[str], *, prompt: bool) -> list[int]:
    """Ids of the whole text, by Jinja and `tokenizers` alone."""
    text = compiled(tiny.TEMPLATES[case.template]).render(
        messages=tiny.turns(*contents), add_generation_prompt=prompt, **NAMED
    )
    return oracle(case).encode(text, add_special_tokens=False).ids


def encoded(made: BatchEncoder, item: Conversation) -> tuple[np.ndarray, np.ndarray]:
    """(ids, whether each is trained) of a conversation."""
    batch = made.encode([made.renderer.render(item)])
    return batch.input_ids, batch.weights > 0


def starts(live: np.ndarray) -> list[int]:
    """Where each trained run begins."""
    return np.flatnonzero(np.diff(live.astype(int), prepend=0) == 1).tolist()


def runs(ids: np.ndarray, live: np.ndarray) -> list[list[int]]:
    """The ids of every run of context and of trained tokens, in turns, context first."""
    return [run.tolist() for run in np.split(ids, np.flatnonzero(np.diff(live)) + 1)]


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What tokens stand for, the bytes put together. Raises where half a character is left over."""
    tokens = [tokenizer.id_to_token(number) for number in ids]
    parts = (BYTES[token] if token in BYTES else token.replace("▁", " ").encode() for token in tokens)
    return b"".join(parts).decode()


def turn_text(case: Case, content: str) -> str:
    """What is trained of a reply: as the template prints it, as far as the vocabulary can say it."""
    if case.kind.startswith("unigram"):
        content = content.replace(
            "<0x41>", "A"
        )  # to tokenizers, a text that is in a Unigram's vocabulary is that token
    ends = {"chatml": "<|im_end|>", "phi": "<|end|>"}
    text = f" {content.strip()} <|im_end|>" if case.template == "instruct" else content + ends[case.template]
    return text.replace("▁", " ")
