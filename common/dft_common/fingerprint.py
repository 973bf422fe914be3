"""Hashes: of bytes, of options, and of what a tokenizer means.

Two tokenizers mean the same when every text gives the same ids, whatever their files' bytes: the
JSON may be ordered otherwise, merges may be strings or pairs, an added token may stand in the
vocabulary too. `dft-prep build` stores the fingerprint; `dft-train` compares it with its model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import xxhash

HASH_CHUNK = 1 << 22


def hash_bytes(data: bytes | memoryview) -> str:
    """128-bit xxh3 as 32 hex digits. It guards against accidents; it is no signature."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> str:
    """`hash_bytes` of a file's content, read in chunks."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def hash_object(value: Any) -> str:
    """Hash of a JSON-like value; the order of an object's keys does not matter."""
    return hash_bytes(msgspec.json.encode(value, order="sorted"))


def _merge_pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else list(merge)


def _vocabulary(model: dict[str, Any]) -> dict[str, Any]:
    vocab = model.get("vocab", {})
    if isinstance(vocab, dict):
        return vocab
    return {piece: [index, score] for index, (piece, score) in enumerate(vocab)}


def tokenizer_meaning(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The parts of a parsed `tokenizer.json` that decide which ids a text gets, in one spelling.

    Keys: `vocabulary` (piece -> id, added tokens included), `merges`, `added_tokens` (content -> flags),
    `model` (its type and options), `normalizer`, `pre_tokenizer`.
    """
    model = tokenizer["model"]
    added = {token["content"]: token for token in tokenizer.get("added_tokens") or []}
    flags = ("id", "special", "lstrip", "rstrip", "single_word", "normalized")
    options = ("type", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    return {
        "vocabulary": {**_vocabulary(model), **{content: token["id"] for content, token in added.items()}},
        "merges": [_merge_pair(merge) for merge in model.get("merges") or []],
        "added_tokens": {content: {flag: token.get(flag) for flag in flags} for content, token in added.items()},
        "model": {option: model.get(option) or None for option in options},
        "normalizer": tokenizer.get("normalizer"),
        "pre_tokenizer": tokenizer.get("pre_tokenizer"),
    }


def tokenizer_fingerprint(tokenizer: dict[str, Any]) -> dict[str, str]:
    """One hash for each part of `tokenizer_meaning`."""
    return {part: hash_object(value) for part, value in tokenizer_meaning(tokenizer).items()}


def load_tokenizer_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _some(items: list[str]) -> str:
    shown = ", ".join(repr(item) for item in items[:5])
    return shown + (f" and {len(items) - 5:,} more" if len(items) > 5 else "")


def _mapping_difference(part: str, ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, str]) -> list[str]:
    lines = []
    if only := [key for key in ours if key not in theirs]:
        lines.append(f"{part}: only {names[0]} has {_some(only)}")
    if only := [key for key in theirs if key not in ours]:
        lines.append(f"{part}: only {names[1]} has {_some(only)}")
    changed = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    if changed:
        first = changed[0]
        lines.append(
            f"{part}: {len(changed):,} differ, the first {first!r}: "
            f"{ours[first]} in {names[0]}, {theirs[first]} in {names[1]}"
        )
    return lines


def describe_difference(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, str]) -> list[str]:
    """What differs between two `tokenizer_meaning`s, a line a difference; empty where they mean the same."""
    lines: list[str] = []
    for part in ours:
        if ours[part] == theirs[part]:
            continue
        if part in ("vocabulary", "added_tokens"):
            lines += _mapping_difference(part, ours[part], theirs[part], names)
        elif part == "merges":
            at = next(
                (i for i, (a, b) in enumerate(zip(ours[part], theirs[part], strict=False)) if a != b),
                min(len(ours[part]), len(theirs[part])),
            )
            lines.append(f"merges: {len(ours[part]):,} and {len(theirs[part]):,} of them, they part at merge {at:,}")
        else:
            lines.append(
                f"{part}: {json.dumps(ours[part])[:200]} in {names[0]}, {json.dumps(theirs[part])[:200]} in {names[1]}"
            )
    return lines
