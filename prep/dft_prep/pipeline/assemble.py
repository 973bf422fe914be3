"""Parts -> the dataset's splits: duplicates left out, each row sent to its side, shards written in corpus order.

Called by `build` when every unit is done. Only the keys (20 bytes a row) are held in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from dft_common.manifest import Counts, SplitInfo, encode_json
from dft_common.schema import DATASET_DICT_NAME, SPLITS, TRAIN, VALIDATION, TokenDtype, datasets_features
from dft_prep.pipeline.work import PartInfo
from dft_prep.shards.parts import read_part, read_part_keys
from dft_prep.shards.split import KEY_DTYPE, duplicates, in_validation
from dft_prep.shards.writer import ShardWriter
from dft_prep.sources.named import Source


class PartOfSource(msgspec.Struct, frozen=True, kw_only=True):
    """A finished part, and the source (by number) it belongs to."""

    path: Path
    source: int
    info: PartInfo


class AssembleOptions(msgspec.Struct, frozen=True, kw_only=True):
    deduplicate: bool
    validation_split_percentage: float
    seed: int
    token_dtype: TokenDtype
    shard_bytes: int


class Assembled(msgspec.Struct, frozen=True, kw_only=True):
    splits: dict[str, SplitInfo]
    counts: list[Counts]
    """One a source; `read`, `left_out` included."""


def _counts(sources: Sequence[Source], parts: Sequence[PartOfSource]) -> list[Counts]:
    counts = [Counts() for _ in sources]
    for part in parts:
        count = counts[part.source]
        count.read += part.info.read
        for code, number in part.info.left_out.items():
            count.left_out[code] = count.left_out.get(code, 0) + number
    return counts


def _limit(kept: np.ndarray, first: np.ndarray, already: int, limit: int | None) -> np.ndarray:
    """`kept` without the rows beyond the source's max_conversations. first: whether a row begins a conversation."""
    if limit is None:
        return kept
    return kept & (already + np.cumsum(kept & first) <= limit)


def assemble(
    sources: Sequence[Source], parts: Sequence[PartOfSource], directory: Path, options: AssembleOptions
) -> Assembled:
    """Write `directory/train` and `directory/validation` from `parts`, which are in the order of the corpus."""
    keys = np.concatenate([np.zeros(0, KEY_DTYPE), *(read_part_keys(part.path) for part in parts)])
    repeated = duplicates(keys) if options.deduplicate else np.zeros(len(keys), bool)
    validation = in_validation(keys["content"], options.validation_split_percentage, options.seed)
    writers = {split: ShardWriter(directory / split, options.token_dtype, options.shard_bytes) for split in SPLITS}
    counts = _counts(sources, parts)
    at = 0
    for part in parts:
        source, count = sources[part.source], counts[part.source]
        for rows in read_part(part.path):
            here = slice(at, at + len(rows))
            at += len(rows)
            first = rows.keys["turn"] == 0  # a conversation's rows are in one batch
            kept = _limit(~repeated[here], first, count.kept, source.max_conversations)
            over = int((~repeated[here] & ~kept & first).sum())
            if over:
                count.left_out["over_max_conversations"] = count.left_out.get("over_max_conversations", 0) + over
            count.duplicates += int((repeated[here] & first).sum())
            count.kept += int((kept & first).sum())
            count.rows += int(kept.sum())
            count.tokens += int(rows.lengths()[kept].sum())
            side = validation[here] if source.split is None else np.full(len(rows), source.split == VALIDATION)
            for split, chosen in ((TRAIN, kept & ~side), (VALIDATION, kept & side)):
                selected = rows.select(chosen)
                count.trained_tokens += int(np.count_nonzero(selected.weights))
                writers[split].add(selected, source.name)
    splits = {split: _finish(writers[split], directory / split, options.token_dtype) for split in SPLITS}
    (directory / DATASET_DICT_NAME).write_bytes(msgspec.json.encode({"splits": list(SPLITS)}) + b"\n")
    return Assembled(splits=splits, counts=counts)


def _finish(writer: ShardWriter, directory: Path, dtype: TokenDtype) -> SplitInfo:
    shards = writer.finish()
    info = SplitInfo(
        rows=sum(shard.rows for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        trained_tokens=sum(shard.trained_tokens for shard in shards),
        longest=writer.longest,
        shards=shards,
    )
    _write_datasets_files(directory, info, dtype)
    return info


def _write_datasets_files(directory: Path, info: SplitInfo, dtype: TokenDtype) -> None:
    """`dataset_info.json` and `state.json`, by which `datasets.load_from_disk` opens the split."""
    fingerprint = "".join(shard.checksum for shard in info.shards)[:16]
    state = {
        "_data_files": [{"filename": shard.name} for shard in info.shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": directory.name,
    }
    about = {"citation": "", "description": "", "homepage": "", "license": ""}
    (directory / "state.json").write_bytes(encode_json(state))
    (directory / "dataset_info.json").write_bytes(encode_json({**about, "features": datasets_features(dtype)}))
