"""Tokens as a person can judge them: what is trained, what is context, which are control tokens.

Called by `preview` and `inspection`. On a terminal trained text is green, context dim and control tokens bold;
elsewhere trained text stands in ⟦ ⟧ and control tokens in ‹ ›. Text from data is escaped: no control sequence
in it reaches the terminal.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from dft_common.errors import printable
from dft_prep.tokenizer_files import TokenizerFiles

LEGEND = "⟦trained⟧ ‹control token›"
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_PART_OF_A_CHARACTER = "\ufffd"


class Token(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    text: str
    """Or `<0xE6>` for a part of a character."""
    trained: bool


class Segment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run of tokens with the same weight, or one control token."""

    trained: bool
    text: str
    control: bool = False
    weight: float | None = None
    """Where it is neither 0 nor 1."""


class Decoder:
    """Token ids -> segments and tokens, with one tokenizer."""

    def __init__(self, tokenizer: TokenizerFiles) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer.tokenizer_json)
        self._control = np.array(sorted(token.id for token in tokenizer.control_tokens()), np.int64)

    def _decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def segments(self, ids: np.ndarray, weights: np.ndarray) -> list[Segment]:
        """ids: [tokens]; weights: [tokens] float, 0 is context. The texts joined are the decoded row."""
        if not len(ids):
            return []
        control = np.isin(ids, self._control)
        changes = (np.diff(weights) != 0) | control[1:] | control[:-1]
        edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(ids)]
        segments = []
        shown = ""
        for start, end in itertools.pairwise(edges):
            # Not the run alone: some decoders drop a space at the beginning of what they are given.
            text = self._decode(ids[:end])
            weight = float(weights[start])
            segments.append(
                Segment(
                    trained=weight > 0,
                    text=text[len(shown) :],
                    control=bool(control[start]),
                    weight=None if weight in (0, 1) else weight,
                )
            )
            shown = text
        return segments

    def tokens(self, ids: np.ndarray, weights: np.ndarray) -> list[Token]:
        """Each token by itself."""
        return [
            Token(id=token, text=self._token_text(token), trained=weight > 0)
            for token, weight in zip(ids.tolist(), weights.tolist(), strict=True)
        ]

    def _token_text(self, token: int) -> str:
        piece = self._tokenizer.id_to_token(token) or ""
        if _BYTE_PIECE.fullmatch(piece):
            return piece
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        if _PART_OF_A_CHARACTER in text and _PART_OF_A_CHARACTER not in piece:
            return "".join(f"<0x{self._byte_of[c]:02X}>" if c in self._byte_of else c for c in piece)
        if piece.startswith("▁") and not text.startswith(" "):
            return f" {text}"
        return text

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The byte that each character of a byte-level piece stands for (GPT-2's table)."""
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in plain]
        shifted = {chr(256 + at): byte for at, byte in enumerate(others)}
        return {**{chr(byte): byte for byte in plain}, **shifted}


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to show: a row, a conversation, or why a record would be left out."""

    title: str
    about: dict[str, Any]
    """What `--format json` says of it."""
    segments: list[Segment] = []
    tokens: list[Token] | None = None
    """Where token borders were asked for."""

    def as_object(self) -> dict[str, Any]:
        value = {**self.about, "segments": msgspec.to_builtins(self.segments)}
        return value if self.tokens is None else {**value, "tokens": msgspec.to_builtins(self.tokens)}


def print_text(items: Sequence[Shown]) -> None:
    """Print to stdout, in colours where it is a terminal that has them."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    for item in items:
        console.print(Text(printable(item.title), style="bold"))
        line = Text()
        trained = False
        for segment in item.segments:
            if not coloured and segment.trained != trained:
                line.append("⟦" if segment.trained else "⟧")
            trained = segment.trained
            _append(line, segment, coloured)
        if trained and not coloured:
            line.append("⟧")
        if item.segments:
            console.print(line)
        if item.tokens is not None:
            borders = "│".join(printable(token.text).replace("\n", "\\n") for token in item.tokens)
            console.print(Text(f"│{borders}│", style="dim" if coloured else ""))


def _append(line: Any, segment: Segment, coloured: bool) -> None:
    text = printable(segment.text)
    if segment.weight is not None and not segment.control:
        text = f"[{segment.weight:g}]{text}"
    if not coloured:
        line.append(f"‹{text}›" if segment.control else text)
        return
    style = "green" if segment.trained else "dim"
    if segment.control:
        style = "bold green" if segment.trained else "bold magenta"
    line.append(text, style=style)
