"""Runs of words that texts share: a set of 13-grams as 64-bit hashes, and a quick look for them in a conversation.

Made by `decontaminate`; asked by workers for every conversation. A word is a run of letters and digits after NFKC and
case folding; Chinese and Japanese, which put no spaces between words, count each character as one. So punctuation,
white space, case and full-width forms do not hide a copy.

Hashing every run of a text would take most of a build's time. But of any 13 words in a row, 6 begin at a multiple of
8: so only every eighth block of 6 words is looked up, in a small table, and runs are hashed around a block that is
there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import xxhash

from dft_common.fingerprint import hash_bytes
from dft_common.records import Conversation

WORDS = 13
"""Words in a row that two texts do not share by chance: as the GPT-3 report and most since have it."""
FEWEST_WORDS = 8
"""A text of fewer than 13 words is compared whole, down to this many: shorter ones are anybody's ("What is 2 + 2?")."""

_BLOCK = 6
_TABLE_BITS = 16
"""Bits of the table for each run: of blocks that are not in it, about one in this many seems to be."""
_LONGEST_SHOWN = 120

_CHARACTER_WORDS = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[^\W_{_CHARACTER_WORDS}]+|[^\W_]")
_ASCII = bytes(ord(chr(code).lower()) if code < 128 and chr(code).isalnum() else ord(" ") for code in range(256))

_hash = xxhash.xxh3_64_intdigest


def words_of(text: str) -> list[bytes]:
    """The words that are compared of a text, in UTF-8."""
    if text.isascii():
        return text.encode().translate(_ASCII).split()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall(folded)).encode("utf-8", "surrogatepass").split(b" ")


class Ngrams:
    """A set of runs of words. Picklable: 8 bytes a run, and 2 to 4 for the table."""

    def __init__(self, runs: dict[int, np.ndarray], blocks: bytes) -> None:
        """runs: number of words -> [runs] sorted uint64, each once. blocks: the table, of a power of two bytes."""
        self.runs, self.blocks = runs, blocks
        self._longest_first = sorted(runs, reverse=True)
        self._stride = min(runs, default=WORDS) - _BLOCK + 1

    def __len__(self) -> int:
        return sum(map(len, self.runs.values()))

    @property
    def fingerprint(self) -> str:
        """The same for the same runs, whatever files they came from and in which order."""
        return hash_bytes(b"".join(bytes([count]) + self.runs[count].tobytes() for count in sorted(self.runs)))

    def find(self, conversation: Conversation) -> tuple[int, str] | None:
        """(index of the first message that holds a run, the words of it), looking at every message's texts."""
        for number, message in enumerate(conversation.messages):
            for text in (message.reasoning, message.content):
                if text and (found := self.find_in(text)):
                    return number, found
        return None

    def find_in(self, text: str) -> str | None:
        """The words of the first run that the text holds, shortened."""
        words = words_of(text)
        blocks, mask = self.blocks, len(self.blocks) * 8 - 1
        for start in range(0, len(words) - _BLOCK + 1, self._stride):
            block = _hash(b" ".join(words[start : start + _BLOCK])) & mask
            if blocks[block >> 3] >> (block & 7) & 1 and (found := self._around(words, start)):
                return found
        return None

    def _around(self, words: Sequence[bytes], start: int) -> str | None:
        """The first run that holds the block which begins at `start`."""
        for count in self._longest_first:
            # A run around it holds the block that begins `apart` words before it, or the one `apart` words after it.
            apart = (count - _BLOCK + 1) // 2
            if not (self._has_block(words, start - apart) or self._has_block(words, start + apart)):
                continue
            first = max(0, start + _BLOCK - count)
            hashes = np.fromiter(_run_hashes(words[first : start + count], count), np.uint64)
            known = self.runs[count]
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            hits = np.flatnonzero(known[places] == hashes)
            if len(hits):
                run = words[first + int(hits[0]) :][:count]
                shown = b" ".join(run).decode("utf-8", "surrogatepass")
                return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."
        return None

    def _has_block(self, words: Sequence[bytes], start: int) -> bool:
        if not 0 <= start <= len(words) - _BLOCK:
            return False
        block = _hash(b" ".join(words[start : start + _BLOCK])) & (len(self.blocks) * 8 - 1)
        return bool(self.blocks[block >> 3] >> (block & 7) & 1)


def make_ngrams(texts: Iterable[str]) -> Ngrams:
    """The runs of 13 words of each text, or all of it where it has 8 to 12. None lies across two texts."""
    runs: dict[int, list[np.ndarray]] = {}
    blocks: list[np.ndarray] = []
    for text in texts:
        words = words_of(text)
        if len(words) < FEWEST_WORDS:
            continue
        count = min(len(words), WORDS)
        runs.setdefault(count, []).append(np.fromiter(_run_hashes(words, count), np.uint64))
        blocks.append(np.fromiter(_run_hashes(words, _BLOCK), np.uint64))
    unique = {count: np.unique(np.concatenate(hashes)) for count, hashes in runs.items()}
    return Ngrams(unique, _table(np.unique(np.concatenate(blocks))) if blocks else bytes(1))


def _run_hashes(words: Sequence[bytes], count: int) -> Iterator[int]:
    return (_hash(b" ".join(words[start : start + count])) for start in range(len(words) - count + 1))


def _table(blocks: np.ndarray) -> bytes:
    """One bit for each of the blocks' hashes, at its low bits."""
    size = 1 << max(3, (len(blocks) * _TABLE_BITS - 1).bit_length())
    bits = np.zeros(size, np.uint8)
    bits[blocks & np.uint64(size - 1)] = 1
    return np.packbits(bits, bitorder="little").tobytes()
