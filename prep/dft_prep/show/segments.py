"""Token ids -> segments: runs of text with one weight, and each control token by itself.

Called by `preview` and `inspection`; `show` prints what comes out. Works with the tokenizer's own decoder, whatever
it does with spaces, so that the segments' texts joined are the decoded row.
"""

from __future__ import annotations

import codecs
import itertools
import re

import msgspec
import numpy as np

from dft_prep.tokenizer_files import TokenizerFiles

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE_PIECE = "▁"
"""What SentencePiece vocabularies write for a space."""
_UNDECODED = "\ufffd"


def _as_hex(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("dft_prep.as_hex", _as_hex)


def _byte_table() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + at): byte for at, byte in enumerate(others)}}


_BYTE_OF = _byte_table()


class Token(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    text: str
    """Bytes that are only a part of a character are written `<0xE6>`; the id tells them from such a text."""
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
        self._texts: dict[int, str] = {}

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def edges(self, ids: np.ndarray, weights: np.ndarray) -> list[int]:
        """Where segments begin, and the row's end: at each change of weight, before and after a control token."""
        if not len(ids):
            return []
        control = np.isin(ids, self._control)
        changes = (np.diff(weights) != 0) | control[1:] | control[:-1]
        return [0, *(np.flatnonzero(changes) + 1).tolist(), len(ids)]

    def segments(self, ids: np.ndarray, weights: np.ndarray) -> list[Segment]:
        """ids: [tokens]; weights: [tokens] float, 0 is context."""
        numbers = ids.tolist()
        control = np.isin(ids, self._control)
        segments = []
        context = 0
        for start, end in itertools.pairwise(self.edges(ids, weights)):
            weight = float(weights[start])
            segments.append(
                Segment(
                    trained=weight > 0,
                    text=self._text_after(numbers[context:start], numbers[start:end]),
                    control=bool(control[start]),
                    weight=None if weight in (0, 1) else weight,
                )
            )
            if control[start]:
                context = start
        return segments

    def _text_after(self, before: list[int], run: list[int]) -> str:
        """The text that `run` adds to that of the tokens before it.

        Not that of the run alone: some decoders drop a space at the beginning of what they are given. A control
        token is context enough, so that a long row is not decoded again for each of its segments.
        """
        shown = self._decode(before)
        text = self._decode([*before, *run])
        return text[len(shown) :] if text.startswith(shown) else self._decode(run)

    def tokens(self, ids: np.ndarray, weights: np.ndarray) -> list[Token]:
        """Each token by itself."""
        return [
            Token(id=token, text=self._token_text(token), trained=weight > 0)
            for token, weight in zip(ids.tolist(), weights.tolist(), strict=True)
        ]

    def _token_text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._make_token_text(token)
        return self._texts[token]

    def _make_token_text(self, token: int) -> str:
        piece = self._tokenizer.id_to_token(token) or ""
        text = self._decode([token])
        if _UNDECODED in text:
            if _BYTE_PIECE.fullmatch(piece):
                return piece
            if all(character in _BYTE_OF for character in piece):
                return bytes(_BYTE_OF[character] for character in piece).decode("utf-8", "dft_prep.as_hex")
        spaces = len(piece) - len(piece.lstrip(_SPACE_PIECE))
        return " " * spaces + text.lstrip(" ") if spaces else text
