"""A few packs of a dataset, cut short, as a dataset of its own: what the layouts of `verify` train on.

Everything but the pack index is the dataset's own, by symbolic links, so that the layouts take the very path of a
training. The excerpt's packs make two optimizer steps, the second one pack short. Called by `verify`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from dft_common.errors import DataError
from dft_common.fingerprint import hash_file
from dft_common.manifest import encode_json, read_manifest
from dft_common.packs import PackIndex, choose_pack_index
from dft_common.reader import SplitReader
from dft_common.schema import IGNORE_INDEX, PACK_SCHEMA, PACKS_DIR, TRAIN
from dft_train.data.collate import slice_labels

GLOBAL_BATCH = 4
_PACKS = 2 * GLOBAL_BATCH - 1
Piece = tuple[int, int, int, int]
"""Row, start, end and live labels, as in the index."""


def _cut(reader: SplitReader, row: int, start: int, end: int, room: int) -> Piece:
    """At most `room` tokens of a slice, up to its last live label."""
    labels = slice_labels(reader.row(row, start, end))
    live = np.flatnonzero(labels != IGNORE_INDEX)
    stop = int(live[-1]) + 1 if len(live) else len(labels)
    first = max(0, stop - room)
    return row, start + first, start + stop, int(((live > first) & (live < stop)).sum())


def _excerpt_of(reader: SplitReader, pack: list[Any], tokens: int) -> list[Piece]:
    """Slices of one pack, several where it has several, together at most `tokens`."""
    pieces, room = [], tokens
    for piece in pack:
        share = room if piece is pack[-1] else max(2, min(room, tokens // 3))
        if room < 2:
            break
        pieces.append(_cut(reader, piece.row, piece.start, piece.end, min(room, share)))
        room -= pieces[-1][2] - pieces[-1][1]
    return pieces


def _write_index(path: Path, packs: list[list[Piece]]) -> None:
    columns: list[Any] = [[[piece[at] for piece in pack] for pack in packs] for at in range(4)]
    columns.append([0] * len(packs))
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, PACK_SCHEMA, strict=True)]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, PACK_SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=PACK_SCHEMA))


def _link_all(dataset_dir: Path, out: Path, name: str) -> None:
    """Links to all of the dataset but the index files called `name`."""
    (out / PACKS_DIR).mkdir(parents=True)
    for path in dataset_dir.iterdir():
        if path.name != PACKS_DIR:
            (out / path.name).symlink_to(path.resolve())
    for path in (dataset_dir / PACKS_DIR).iterdir():
        if path.stem != Path(name).stem:
            (out / PACKS_DIR / path.name).symlink_to(path.resolve())


def write_excerpt(dataset_dir: Path, out: Path, max_length: int | None, tokens: int) -> int:
    """Make the excerpt in `out`; returns its trained labels. tokens: of a pack, at most. Raises DataError."""
    manifest = read_manifest(dataset_dir)
    length = max_length or manifest.recipe["max_length"]
    info = choose_pack_index(dataset_dir, TRAIN, length, manifest.recipe, manifest.fingerprint)
    index, reader = PackIndex(dataset_dir, info), SplitReader(dataset_dir, TRAIN, manifest)
    numbers = np.linspace(0, len(index) - 1, num=min(_PACKS, len(index)), dtype=int)
    packs = [_excerpt_of(reader, index[int(number)], tokens) for number in numbers]
    live = sum(piece[3] for pack in packs for piece in pack)
    if not live:
        raise DataError(
            f"{dataset_dir}: the packs that were tried have no trained token in their first {tokens} tokens",
            remedy="give a larger --verify_tokens",
        )
    _link_all(dataset_dir, out, info.name)
    path = out / PACKS_DIR / info.name
    _write_index(path, packs)
    counts = {
        "packs": len(packs),
        "slices": sum(map(len, packs)),
        "tokens": sum(piece[2] - piece[1] for pack in packs for piece in pack),
        "live": live,
        "bytes": path.stat().st_size,
        "checksum": hash_file(path),
    }
    path.with_suffix(".json").write_bytes(encode_json(msgspec.structs.replace(info, **counts)))
    return live
