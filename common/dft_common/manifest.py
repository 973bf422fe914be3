"""The manifest: everything needed to trust a dataset, and nothing that differs between two builds of the same.

`dft_prep.pipeline.build` writes it last, so that its presence means a complete dataset; `dft_train` and
`dft-prep verify`, `inspect` and `pack` read it first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dft_common.errors import DataError
from dft_common.fingerprint import hash_object
from dft_common.schema import FORMAT_VERSION, MANIFEST_NAME, TokenDtype


class FileInfo(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """Relative to what the user named, so that a moved corpus builds the same dataset."""
    size: int
    units: int
    checksum: str
    """Hash of the hashes of its work units, in order."""


class Counts(msgspec.Struct, kw_only=True):
    """`read == kept + sum(left_out.values()) + duplicates`, asserted at the end of every build."""

    read: int = 0
    kept: int = 0
    rows: int = 0
    """Rows that the kept conversations became: more than one each where turns were unrolled."""
    duplicates: int = 0
    left_out: dict[str, int] = {}
    tokens: int = 0
    trained_tokens: int = 0


class SourceInfo(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    files: list[FileInfo]
    counts: Counts
    ignored_fields: dict[str, int]
    """Fields that were not understood, and in how many records."""


class ShardInfo(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    rows: int
    tokens: int
    trained_tokens: int
    bytes: int
    checksum: str


class SplitInfo(msgspec.Struct, frozen=True, kw_only=True):
    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    """Tokens of the longest row."""
    shards: list[ShardInfo]


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    fingerprint: dict[str, str]
    """`dft_common.fingerprint.tokenizer_fingerprint`: one hash for each part of the tokenizer's meaning."""
    vocab_size: int
    """Highest token id plus one, added tokens included."""
    eos_token: str | None
    pad_token: str | None
    added_tokens: list[str]
    """Control tokens that the build added to the tokenizer it was given (`--add_chatml_tokens`)."""


class TemplateInfo(msgspec.Struct, frozen=True, kw_only=True):
    fingerprint: str
    origin: str
    end_of_turn: str | None
    """The control token that ends an assistant turn, where the template has one."""
    generation_prompt: str
    checks: dict[str, Any]
    """The outcome of the self-checks at the build's start."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int
    toolkit_version: str
    libraries: dict[str, str]
    recipe: dict[str, Any]
    """Every option that decides what the dataset holds."""
    recipe_fingerprint: str
    """Hash of recipe, tokenizer, template and source bytes: equal means that a build would do nothing new."""
    fingerprint: str
    """Hash of the rows themselves: what a training run records."""
    token_dtype: TokenDtype
    encoder: str
    tokenizer: TokenizerInfo
    template: TemplateInfo
    sources: list[SourceInfo]
    counts: Counts
    warnings: dict[str, int]
    splits: dict[str, SplitInfo]


def rows_fingerprint(splits: Mapping[str, SplitInfo]) -> str:
    """`Manifest.fingerprint`: the hash of every shard's checksum, in order."""
    return hash_object([[split, shard.checksum] for split, info in splits.items() for shard in info.shards])


def encode_json(value: Any) -> bytes:
    """`value` as indented JSON with a final newline: what every JSON file of the dataset is written as."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds all of it or is not there, whatever happens in between."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_manifest(dataset_dir: Path, manifest: Manifest) -> None:
    write_atomically(dataset_dir / MANIFEST_NAME, encode_json(manifest))


def read_manifest(dataset_dir: Path) -> Manifest:
    """The manifest of a complete dataset. Raises DataError, with the remedy, for anything else."""
    path = dataset_dir / MANIFEST_NAME
    rebuild = "build it with `dft-prep build --data_files ... --tokenizer ... --output_dir " + str(dataset_dir) + "`"
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not dataset_dir.is_dir():
            raise DataError(f"{dataset_dir}: there is no such dataset directory", remedy=rebuild) from None
        raise DataError(
            f"{dataset_dir}: no {MANIFEST_NAME}, so this is not a complete dataset (the manifest is written last)",
            remedy=rebuild + "; an interrupted build goes on from what it finished",
        ) from None
    try:
        version = msgspec.json.decode(data).get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: dataset format {version}, this version reads format {FORMAT_VERSION}",
                remedy="build the dataset again with this version, or use the version that wrote it",
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, AttributeError) as error:
        raise DataError(f"{path}: the manifest is damaged: {error}", remedy=rebuild) from None
