"""Text -> token ids, many texts at a time: the fast engine, and the one that judges it.

Called by `encode`. Both take plain text, in which control tokens are not recognised, and give ids in two
flat arrays. `fastokens` is much faster and young, so it is trusted only while it is checked:
on a torture set at the start, and on one conversation in a thousand all along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dft_common.logs import get_logger
from dft_prep.tokenizer_files import TokenizerFiles


class EncoderMismatch(Exception):
    """The fast engine gave other ids than `tokenizers`: everything that it made is done again without it."""


class Encoder(Protocol):
    """Encodes texts in which control tokens are plain text."""

    name: str

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [tokens] uint32, offsets [texts + 1] int64): text i has ids[offsets[i]:offsets[i + 1]]."""
        ...


class ReferenceEncoder:
    """The `tokenizers` library: the judge, and the fallback."""

    name = "tokenizers"

    def __init__(self, tokenizer: TokenizerFiles) -> None:
        from tokenizers import Tokenizer

        self._plain = Tokenizer.from_str(tokenizer.tokenizer_json)
        self._plain.encode_special_tokens = True
        self._whole = Tokenizer.from_str(tokenizer.tokenizer_json)
        for encoder in (self._plain, self._whole):
            encoder.no_truncation()
            encoder.no_padding()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.asarray(encoding.ids, np.uint32) for encoding in encodings]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(item) for item in ids], out=offsets[1:])
        return (np.concatenate(ids) if ids else np.zeros(0, np.uint32)), offsets

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a whole rendered text, control tokens recognised: what inference feeds."""
        return self._whole.encode(text, add_special_tokens=False).ids


class FastEncoder:
    """The `fastokens` engine. Raises whatever it raises for a tokenizer that it does not know."""

    name = "fastokens"

    def __init__(self, tokenizer: TokenizerFiles) -> None:
        from fastokens import Tokenizer

        self._native = Tokenizer.from_json_str(tokenizer.tokenizer_json)
        self._native.no_truncation()
        self._native.no_padding()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._native.encode_batch_flat(texts, split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)


def torture_texts(tokenizer: TokenizerFiles) -> list[str]:
    """Texts on which encoders differ: white space, control tokens as text, scripts, emoji, numbers, bytes."""
    added = [token["content"] for token in tokenizer.parsed().get("added_tokens") or []][:200]
    bases = [
        "", " ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "a", " a", "a ", "Hello, world!", "don't we'll I'M",
        "x" * 5000, " " * 1000, "ab" * 3000, "1234567890" * 30, "3.14159, 1,000,000 and 0x1F", "€ £ ¥ ¢",
        "naïve café résumé", "e\u0301 n\u0303 A\u030a", "Straße ﬁne ŒUVRE", "日本語のテキスト。中文文本，没有空格",
        "한국어 텍스트", "Привет, мир", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "ไทยไม่มีช่องว่าง",
        "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈", "\u200b\u200d\ufeff", "\u2028\u2029\x85", "\x00\x01\x02\x7f", "\U0010ffff\U000f0000\ue000",
        "def f(x):\n    return x\n\n\n    # done\n", "{\"a\": [1, 2, {\"b\": null}]}", "<div class=\"x\">&amp;</div>",
        "https://example.org/a?b=c&d=%20e#f", "C:\\path\\to\\file", "___---===***", "!!!???...", "$$\\frac{a}{b}$$",
        "▁▁ ▁ x▁y", "Ġ Ċ ĉ", "##word ##s", "<0x0A><0x00>", "a\u00a0b\u3000c", "trailing ", "\n leading", "'s't're",
    ]  # fmt: skip
    around = [f"{left}{token}{right}" for token in added for left, right in (("", ""), ("a", "b"), (" ", " \n"))]
    return [*bases, *added, *around, *(f"{a}{b}" for a, b in zip(bases, reversed(bases), strict=True))]


def same_ids(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> bool:
    return np.array_equal(first[1], second[1]) and np.array_equal(first[0], second[0])


def choose_encoder(
    wanted: str, tokenizer: TokenizerFiles, reference: ReferenceEncoder, sample: Sequence[str]
) -> Encoder:
    """The engine to use: `wanted`, or for `auto` the fast one where it passes every check on this tokenizer."""
    if wanted == ReferenceEncoder.name:
        return reference
    texts = [*torture_texts(tokenizer), *sample]
    try:
        fast = FastEncoder(tokenizer)
        if same_ids(fast.encode(texts), reference.encode(texts)):
            return fast
        reason = "it gives other ids than tokenizers"
    except Exception as error:  # it refuses a tokenizer with whatever its parser raises
        reason = f"it refuses it: {str(error)[:200]}"
    get_logger().warning("fastokens is not used for this tokenizer (%s); tokenizers encodes, slower", reason)
    return reference


def make_encoder(name: str, tokenizer: TokenizerFiles, reference: ReferenceEncoder) -> Encoder:
    return FastEncoder(tokenizer) if name == FastEncoder.name else reference
