"""`dft-prep inspect`: what a dataset holds, its counts, and rows with what is trained in them.

Called by `cli`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dft_common.errors import DataError, SetupError, printable
from dft_common.manifest import Manifest, read_manifest
from dft_common.packs import PackIndex, check_pack_index, list_pack_indexes
from dft_common.reader import Row, SplitReader
from dft_common.schema import TOKENIZER_DIR
from dft_prep.pipeline.report import summary_lines
from dft_prep.show.printing import Shown, print_json, print_text
from dft_prep.show.segments import Decoder
from dft_prep.tokenizer_files import load_tokenizer

_MOST_TURNS = 10_000


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What `inspect` was asked for; at most one of these."""

    row: int | None = None
    id: str | None = None
    source: str | None = None
    pack: int | None = None

    def is_empty(self) -> bool:
        return all(value is None for value in msgspec.structs.astuple(self))


def inspect(dataset_dir: Path, split: str, selection: Selection, output_format: str, *, tokens: bool) -> None:
    """Print the dataset's counts, or the selected rows with what is trained in them."""
    if sum(value is not None for value in msgspec.structs.astuple(selection)) > 1:
        raise SetupError("inspect: more than one of --row, --id, --source and --pack", remedy="give one of them")
    manifest = read_manifest(dataset_dir)
    reader = SplitReader(dataset_dir, split, manifest)
    decoder = Decoder(load_tokenizer(str(dataset_dir / TOKENIZER_DIR)))
    selected = _selected(dataset_dir, split, reader, selection, manifest)
    items = [_shown(split, number, row, decoder, tokens) for number, row in selected]
    if output_format == "json":
        value: Any = [item.as_object() for item in items]
        if selection.is_empty():
            value = {"manifest": msgspec.to_builtins(manifest), "rows": value}
        print_json(value)
        return
    if selection.is_empty():
        indexes = [index for name in manifest.splits for index in list_pack_indexes(dataset_dir, name)]
        lines = [str(dataset_dir), *summary_lines(manifest, indexes)]
        sys.stdout.write("\n".join(printable(line) for line in lines) + "\n")
    if items:
        print_text(items, borders=tokens)


def _shown(split: str, number: int, row: Row, decoder: Decoder, tokens: bool) -> Shown:
    trained = int(row.assistant_masks.sum())
    weights = row.loss_weights if row.loss_weights is not None else row.assistant_masks.astype(np.float32)
    counts = {"tokens": len(row.input_ids), "trained_tokens": trained}
    return Shown(
        title=f"--- {split} row {number}, id {row.id}, source {row.source}: "
        f"{len(row.input_ids):,} tokens, {trained:,} trained",
        about={"row": number, "id": row.id, "source": row.source, **counts},
        segments=decoder.segments(row.input_ids, weights),
        tokens=decoder.tokens(row.input_ids, weights) if tokens else None,
        edges=decoder.edges(row.input_ids, weights),
    )


def _selected(
    dataset_dir: Path, split: str, reader: SplitReader, selection: Selection, manifest: Manifest
) -> Iterator[tuple[int, Row]]:
    if selection.pack is not None:
        yield from _pack_rows(dataset_dir, split, reader, selection.pack, manifest)
        return
    if selection.id is not None:
        yield from _with_id(reader, selection.id, split)
        return
    if selection.source is not None:
        yield next(_matching(reader, "source", selection.source, split))
        return
    number = selection.row or 0
    if not 0 <= number < len(reader):
        if selection.row is None:
            return
        raise SetupError(f"--row {number}: the {split} split has {len(reader):,} rows", remedy="rows count from 0")
    yield number, reader.row(number)


def _matching(reader: SplitReader, column: str, wanted: str, split: str) -> Iterator[tuple[int, Row]]:
    """The rows with the wanted id or source. Raises SetupError where there is none."""
    first, found = 0, False
    for batch in reader.batches():
        for at, value in enumerate(batch.column(column).to_pylist()):
            if value == wanted:
                found = True
                yield first + at, reader.row(first + at)
        first += batch.num_rows
    if not found:
        raise SetupError(f"--{column} {wanted}: not in the {split} split", remedy="see `dft-prep inspect` without it")


def _with_id(reader: SplitReader, wanted: str, split: str) -> Iterator[tuple[int, Row]]:
    """The rows of one conversation, which follow one another: several where its turns were unrolled."""
    rows = _matching(reader, "id", wanted, split)
    number, row = next(rows)
    yield number, row
    for following, row in enumerate(islice(_rows_from(reader, number + 1), _MOST_TURNS), number + 1):
        if row.id != wanted:
            return
        yield following, row


def _rows_from(reader: SplitReader, number: int) -> Iterator[Row]:
    return (reader.row(at) for at in range(number, len(reader)))


def _pack_rows(
    dataset_dir: Path, split: str, reader: SplitReader, number: int, manifest: Manifest
) -> Iterator[tuple[int, Row]]:
    infos = list_pack_indexes(dataset_dir, split)
    if not infos:
        remedy = f"run `dft-prep pack {dataset_dir}`"
        raise DataError(f"{dataset_dir}: no pack index of the {split} split", remedy=remedy)
    wanted = [info for info in infos if info.max_length == manifest.recipe.get("max_length")] or infos
    check_pack_index(dataset_dir, wanted[0], manifest.fingerprint)
    index = PackIndex(dataset_dir, wanted[0])
    if not 0 <= number < len(index):
        raise SetupError(f"--pack {number}: {wanted[0].name} has {len(index):,} packs", remedy="packs count from 0")
    for piece in index[number]:
        yield piece.row, reader.row(piece.row, piece.start, piece.end)
