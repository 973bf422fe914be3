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

_BLOCK, _SHORT_BLOCK = 6, 4
"""Words of the blocks that are looked up for runs of 13, and for the shorter ones, of which there are few."""
_TABLE_BITS = 16
"""Bits of a table for each block in it: of others, about one in this many seems to be there."""
_LONGEST_SHOWN = 120

_CHARACTER_WORDS = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003fffd"
)
_WORDS = re.compile(rf"([{_CHARACTER_WORDS}]+)|([^\W_{_CHARACTER_WORDS}]+)").findall
# No part of any word, and what most texts that are not ASCII have: without it, normalizing takes a hundredth.
_NO_WORDS = re.compile(
    "[\u00a0\u00ab\u00b7\u00bb\u2000-\u206f\u3000-\u3004\u3008-\u3020\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40]"
).sub
_ASCII = bytes(ord(chr(code).lower()) if code < 128 and chr(code).isalnum() else ord(" ") for code in range(256))

_hash = xxhash.xxh3_64_intdigest


def words_of(text: str) -> list[bytes]:
    """The words that are compared of a text, in UTF-8."""
    if not text.isascii():
        text = _NO_WORDS(" ", text)
    if text.isascii():
        return text.encode().translate(_ASCII).split()
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = " ".join([" ".join(characters) if characters else word for characters, word in _WORDS(folded)])
    return spaced.encode("utf-8", "surrogatepass").split()


class _Runs:
    """Runs of some numbers of words, that are found by the same blocks."""

    def __init__(self, block: int, hashes: dict[int, np.ndarray], table: bytes) -> None:
        """hashes: number of words -> [runs] sorted uint64, each once. table: of a power of two bytes."""
        self.block, self.hashes, self.table = block, hashes, table
        # A run of n words holds n - block + 1 blocks, of which one begins at a multiple of as many.
        self.stride = min(hashes) - block + 1

    def find(self, words: Sequence[bytes]) -> Sequence[bytes] | None:
        """The first run that the words hold, or nearly the first."""
        size, table, mask = self.block, self.table, len(self.table) * 8 - 1
        for start in range(0, len(words) - size + 1, self.stride):
            block = _hash(b" ".join(words[start : start + size])) & mask
            if table[block >> 3] >> (block & 7) & 1 and (found := self._around(words, start)):
                return found
        return None

    def _around(self, words: Sequence[bytes], start: int) -> Sequence[bytes] | None:
        """The first run that holds the block which begins at `start`."""
        for count, known in self.hashes.items():
            # Such a run also holds the block `apart` words before, or the one `apart` words after.
            apart = (count - self.block + 1) // 2
            if not (self._has_block(words, start - apart) or self._has_block(words, start + apart)):
                continue
            first = max(0, start + self.block - count)
            hashes = np.fromiter(_run_hashes(words[first : start + count], count), np.uint64)
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            hits = np.flatnonzero(known[places] == hashes)
            if len(hits):
                return words[first + int(hits[0]) :][:count]
        return None

    def _has_block(self, words: Sequence[bytes], start: int) -> bool:
        if not 0 <= start <= len(words) - self.block:
            return False
        block = _hash(b" ".join(words[start : start + self.block])) & (len(self.table) * 8 - 1)
        return bool(self.table[block >> 3] >> (block & 7) & 1)


class Ngrams:
    """A set of runs of words. Picklable: 8 bytes a run, and 2 to 4 for its table."""

    def __init__(self, groups: Sequence[_Runs]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return sum(len(hashes) for group in self.groups for hashes in group.hashes.values())

    @property
    def fingerprint(self) -> str:
        """The same for the same runs, whatever files they came from and in which order."""
        hashes = {count: hashes for group in self.groups for count, hashes in group.hashes.items()}
        return hash_bytes(b"".join(bytes([count]) + hashes[count].tobytes() for count in sorted(hashes)))

    def find(self, conversation: Conversation) -> tuple[int, str] | None:
        """(index of the first message that holds a run, the words of it), looking at every message's texts."""
        for number, message in enumerate(conversation.messages):
            for text in (message.reasoning, message.content):
                if text and (found := self.find_in(text)):
                    return number, found
        return None

    def find_in(self, text: str) -> str | None:
        """The words of a run that the text holds, shortened."""
        words = words_of(text)
        for group in self.groups:
            if found := group.find(words):
                shown = b" ".join(found).decode("utf-8", "surrogatepass")
                return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."
        return None


def make_ngrams(texts: Iterable[str]) -> Ngrams:
    """The runs of 13 words of each text, or all of it where it has 8 to 12. None lies across two texts."""
    found: dict[int, list[np.ndarray]] = {}
    blocks: dict[int, list[np.ndarray]] = {_BLOCK: [], _SHORT_BLOCK: []}
    for text in texts:
        words = words_of(text)
        if len(words) < FEWEST_WORDS:
            continue
        count = min(len(words), WORDS)
        found.setdefault(count, []).append(np.fromiter(_run_hashes(words, count), np.uint64))
        size = _block_size(count)
        blocks[size].append(np.fromiter(_run_hashes(words, size), np.uint64))
    groups = []
    for size, hashes in blocks.items():
        runs = {count: np.unique(np.concatenate(found[count])) for count in sorted(found) if _block_size(count) == size}
        if runs:
            groups.append(_Runs(size, runs, _table(np.unique(np.concatenate(hashes)))))
    return Ngrams(groups)


def _block_size(count: int) -> int:
    return _BLOCK if count == WORDS else _SHORT_BLOCK


def _run_hashes(words: Sequence[bytes], count: int) -> Iterator[int]:
    return (_hash(b" ".join(words[start : start + count])) for start in range(len(words) - count + 1))


def _table(blocks: np.ndarray) -> bytes:
    """One bit for each of the blocks' hashes, at its low bits."""
    size = 1 << max(3, (len(blocks) * _TABLE_BITS - 1).bit_length())
    bits = np.zeros(size, np.uint8)
    bits[blocks & np.uint64(size - 1)] = 1
    return np.packbits(bits, bitorder="little").tobytes()
