"""`dft-prep verify`: is this dataset what its manifest says? Every checksum, count and invariant.

Called by `cli`. Reads through `dft_common` alone, so that a fault of the writer cannot hide itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dft_common.errors import DataError
from dft_common.fingerprint import hash_bytes, load_tokenizer_json, tokenizer_fingerprint
from dft_common.manifest import Manifest, SplitInfo, read_manifest, rows_fingerprint
from dft_common.packs import PackIndex, PackIndexInfo, check_pack_index, list_pack_indexes
from dft_common.reader import check_shard_checksum, list_lengths, open_stream
from dft_common.schema import QUARANTINE_NAME, SPLITS, TEMPLATE_NAME, TOKENIZER_DIR, row_schema


def verify(dataset_dir: Path) -> Iterator[str]:
    """What is wrong with the dataset, a sentence each; nothing where all is well.

    Raises DataError where there is no readable manifest at all.
    """
    manifest = read_manifest(dataset_dir)
    yield from _counts(dataset_dir, manifest)
    lengths: dict[str, np.ndarray] = {}
    live_before: dict[str, list[np.ndarray]] = {}
    for split in SPLITS:
        if split not in manifest.splits:
            yield f"manifest: there is no split {split}"
            continue
        found, masks = [], []
        yield from _split(dataset_dir / split, manifest.splits[split], manifest, found, masks)
        lengths[split] = np.concatenate([np.zeros(0, np.int64), *found])
        live_before[split] = masks
    yield from _tokenizer(dataset_dir, manifest)
    for split in lengths:
        try:
            indexes = list_pack_indexes(dataset_dir, split)
        except DataError as error:
            yield error.message
            continue
        for info in indexes:
            yield from _packs(dataset_dir, info, manifest.fingerprint, lengths[split], live_before[split])


def _counts(dataset_dir: Path, manifest: Manifest) -> Iterator[str]:
    counts = manifest.counts
    left_out = sum(counts.left_out.values())
    if counts.read != counts.kept + left_out + counts.duplicates:
        yield f"manifest: {counts.read:,} read are not {counts.kept:,} kept + {left_out:,} left out + duplicates"
    for name in ("read", "kept", "rows", "duplicates", "tokens", "trained_tokens"):
        if getattr(counts, name) != sum(getattr(source.counts, name) for source in manifest.sources):
            yield f"manifest: the sources' counts of {name} do not add up to the total"
    if counts.rows != sum(split.rows for split in manifest.splits.values()):
        yield "manifest: the splits' rows do not add up to the rows of the conversations kept"
    if rows_fingerprint(manifest.splits) != manifest.fingerprint:
        yield "manifest: its fingerprint is not that of its shards"
    yield from _quarantine(dataset_dir / QUARANTINE_NAME, left_out - counts.left_out.get("over_max_conversations", 0))


def _quarantine(path: Path, expected: int) -> Iterator[str]:
    try:
        with path.open("rb") as lines:
            found = sum(1 for _ in lines)
    except FileNotFoundError:
        yield f"{path}: is missing"
        return
    if found != expected:
        yield f"{path}: {found:,} records, the manifest says that {expected:,} were left out"


def _split(
    directory: Path, split: SplitInfo, manifest: Manifest, lengths: list[np.ndarray], masks: list[np.ndarray]
) -> Iterator[str]:
    names = {shard.name for shard in split.shards}
    for path in sorted(directory.glob("*.arrow")):
        if path.name not in names:
            yield f"{path}: a shard that the manifest does not know"
    for shard in split.shards:
        path = directory / shard.name
        try:
            check_shard_checksum(directory, shard)
            batches = open_stream(path)
        except DataError as error:
            yield error.message
            continue
        rows = tokens = trained = 0
        for batch in batches:
            problem = _batch_problem(batch, manifest)
            if problem:
                yield f"{path}: {problem}"
                break
            mask = batch.column("assistant_masks").values.to_numpy(zero_copy_only=False)
            lengths.append(list_lengths(batch.column("input_ids")))
            masks.append(mask)
            rows, tokens, trained = rows + batch.num_rows, tokens + len(mask), trained + int(mask.sum())
        if (rows, tokens, trained) != (shard.rows, shard.tokens, shard.trained_tokens):
            yield f"{path}: {rows:,} rows, {tokens:,} tokens, {trained:,} trained; the manifest says otherwise"


def _batch_problem(batch: pa.RecordBatch, manifest: Manifest) -> str | None:
    if not batch.schema.equals(row_schema(manifest.token_dtype)):
        return f"its columns are {batch.schema.names} with other types than the format's"
    ids, masks, _, _, weights = batch.columns
    if not np.array_equal(list_lengths(ids), list_lengths(masks)):
        return "a row has not one mask value a token"
    values = ids.values.to_numpy()
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= manifest.tokenizer.vocab_size):
        return "a token id lies outside the vocabulary"
    mask = masks.values.to_numpy(zero_copy_only=False)
    running = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    ends = np.concatenate([[0], np.cumsum(list_lengths(ids))])
    if (running[ends[1:]] == running[ends[:-1]]).any():
        return "a row has nothing to train"
    given = list_lengths(weights)
    if ((given != 0) & (given != list_lengths(ids))).any():
        return "a row has not one loss weight a token"
    return _weights_problem(weights, mask, ends)


def _weights_problem(weights: pa.ListArray, mask: np.ndarray, ends: np.ndarray) -> str | None:
    values = weights.values.to_numpy(zero_copy_only=False)
    offsets = weights.offsets.to_numpy()
    for row in np.flatnonzero(np.diff(offsets)).tolist():
        if not np.array_equal(values[offsets[row] : offsets[row + 1]] > 0, mask[ends[row] : ends[row + 1]]):
            return "a row's loss weights are not above 0 just where its mask is True"
    return None


def _tokenizer(dataset_dir: Path, manifest: Manifest) -> Iterator[str]:
    directory = dataset_dir / TOKENIZER_DIR
    try:
        if tokenizer_fingerprint(load_tokenizer_json(directory / "tokenizer.json")) != manifest.tokenizer.fingerprint:
            yield f"{directory}: is another tokenizer than the manifest's"
        if hash_bytes((directory / TEMPLATE_NAME).read_bytes()) != manifest.template.fingerprint:
            yield f"{directory / TEMPLATE_NAME}: is another template than the manifest's"
    except (OSError, ValueError, KeyError) as error:
        yield f"{directory}: cannot be read: {error}"


def _packs(
    dataset_dir: Path, info: PackIndexInfo, fingerprint: str, lengths: np.ndarray, masks: list[np.ndarray]
) -> Iterator[str]:
    try:
        check_pack_index(dataset_dir, info, fingerprint)
        index = PackIndex(dataset_dir, info)
    except DataError as error:
        yield error.message
        return
    columns = [
        np.concatenate([np.zeros(0, np.int64), *(batch.column(name).values.to_numpy() for batch in index.batches)])
        for name in ("rows", "starts", "ends", "lives")
    ]
    rows, starts, ends, lives = (column.astype(np.int64) for column in columns)
    if len(rows) and int(rows.max()) >= len(lengths):
        yield f"{info.name}: a slice of a row that does not exist"
        return
    if ((starts < 0) | (ends <= starts) | (ends > lengths[rows])).any():
        yield f"{info.name}: a slice lies outside its row"
        return
    if (index.token_counts() > info.max_length).any():
        yield f"{info.name}: a pack is longer than {info.max_length:,}"
    order = np.lexsort((starts, rows))
    same = rows[order][1:] == rows[order][:-1]
    if (same & (starts[order][1:] < ends[order][:-1])).any():
        yield f"{info.name}: two slices overlap"
    running = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, bool), *masks]), dtype=np.int64)])
    base = np.concatenate([[0], np.cumsum(lengths)])[rows]
    if (running[base + ends] - running[base + starts + 1] != lives).any():
        yield f"{info.name}: a slice's count of trained labels is wrong"
    totals = (len(index), len(rows), int((ends - starts).sum()), int(lives.sum()))
    if totals != (info.packs, info.slices, info.tokens, info.live):
        yield f"{info.name}: its totals are not those of its JSON file"
