"""Show what is trained and what is context: from data before any build (`preview`), from a dataset (`inspect`).

Called by `cli`. On a terminal trained text is green and context dim; elsewhere trained text stands in ⟦ ⟧.
Text from data is escaped: no control sequence in it reaches the terminal.
"""

from __future__ import annotations

import datetime
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dft_common.errors import DataError, SetupError, printable
from dft_common.manifest import Manifest, encode_json, read_manifest
from dft_common.packs import PackIndex, check_pack_index, list_pack_indexes
from dft_common.reader import Row, SplitReader
from dft_common.schema import TOKENIZER_DIR
from dft_prep.build import learn
from dft_prep.encode import BatchEncoder, EncodedBatch
from dft_prep.encoders import ReferenceEncoder
from dft_prep.readers import UnitReader
from dft_prep.recipe import BuildOptions, make_recipe
from dft_prep.render import RenderRefusal
from dft_prep.report import summary_lines
from dft_prep.sources import Source, resolve_sources
from dft_prep.units import plan_units
from dft_prep.validate import Judged, judge

Segment = tuple[bool, str]
"""(trained, text): a run of tokens with the same mask."""


class Decoder:
    """Token ids -> text, control tokens shown."""

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer_json)

    def segments(self, ids: np.ndarray, trained: np.ndarray) -> list[Segment]:
        """Runs of equal `trained`, decoded."""
        if not len(ids):
            return []
        edges = [0, *(np.flatnonzero(np.diff(trained.astype(np.int8))) + 1).tolist(), len(ids)]
        return [
            (bool(trained[start]), self._tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False))
            for start, end in itertools.pairwise(edges)
        ]


def _print_segments(title: str, segments: Sequence[Segment]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    line = Text()
    for trained, text in segments:
        shown = printable(text)
        if console.is_terminal and not console.no_color:
            line.append(shown, style="green" if trained else "dim")
        else:
            line.append(f"⟦{shown}⟧" if trained else shown)
    console.print(Text(title, style="bold"))
    console.print(line)


def preview(options: BuildOptions, number: int) -> None:
    """Print the first conversations of each source in turn, `number` in all, as a build would store them."""
    recipe = make_recipe(options, datetime.date.today())
    sources = resolve_sources(options.data_files)
    encoder, _ = learn(recipe, [], ReferenceEncoder.name)
    decoder = Decoder(recipe.tokenizer.tokenizer_json)
    shown = 0
    streams = [_preview_source(source, encoder) for source in sources]
    while streams and shown < number:
        for stream in list(streams):
            title_and_batch = next(stream, None)
            if title_and_batch is None:
                streams.remove(stream)
            elif shown < number:
                title, batch = title_and_batch
                _print_segments(title, decoder.segments(batch.input_ids, batch.weights > 0) if batch else [])
                shown += 1
    if not shown:
        raise DataError("nothing to show: the files hold no records", remedy="check --data_files")


def _preview_source(source: Source, encoder: BatchEncoder) -> Iterator[tuple[str, EncodedBatch | None]]:
    for file in source.files:
        for unit in plan_units(file, source.name):
            for raw in UnitReader(unit):
                judged = judge(raw, file.shown)
                where = f"{file.shown}, byte {raw.byte_offset:,}" if raw.byte_offset >= 0 else file.shown
                if not isinstance(judged, Judged):
                    yield f"--- {where}: left out, {judged.code} {judged.path}: {judged.message}", None
                    continue
                try:
                    batch = encoder.encode(encoder.renderer.rows(judged.conversation))
                except RenderRefusal as refusal:
                    yield f"--- {where}: left out, {refusal.code}: {refusal.message}", None
                    continue
                trained = int(np.count_nonzero(batch.weights))
                yield f"--- {where}: {len(batch.input_ids):,} tokens, {trained:,} trained", batch


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What `inspect` was asked for; at most one of these."""

    row: int | None = None
    id: str | None = None
    source: str | None = None
    pack: int | None = None

    def is_empty(self) -> bool:
        return all(value is None for value in msgspec.structs.astuple(self))


def inspect(dataset_dir: Path, split: str, selection: Selection, output_format: str) -> None:
    """Print the dataset's counts, or the selected rows with what is trained in them."""
    if sum(value is not None for value in msgspec.structs.astuple(selection)) > 1:
        raise SetupError("inspect: more than one of --row, --id, --source and --pack", remedy="give one of them")
    manifest = read_manifest(dataset_dir)
    reader = SplitReader(dataset_dir, split, manifest)
    decoder = Decoder((dataset_dir / TOKENIZER_DIR / "tokenizer.json").read_text("utf-8"))
    rows = list(_selected(dataset_dir, split, reader, selection, manifest))
    if output_format == "json":
        value: Any = [_row_object(number, row, decoder) for number, row in rows]
        if selection.is_empty():
            value = {"manifest": msgspec.to_builtins(manifest), "rows": value}
        sys.stdout.write(encode_json(value).decode())
        return
    if selection.is_empty():
        indexes = [index for name in manifest.splits for index in list_pack_indexes(dataset_dir, name)]
        lines = [str(dataset_dir), *summary_lines(manifest, indexes)]
        sys.stdout.write("\n".join(printable(line) for line in lines) + "\n")
    for number, row in rows:
        trained = int(row.assistant_masks.sum())
        counts = f"{len(row.input_ids):,} tokens, {trained:,} trained"
        title = f"--- {split} row {number}, id {row.id}, source {row.source}: {counts}"
        _print_segments(title, decoder.segments(row.input_ids, row.assistant_masks))


def _row_object(number: int, row: Row, decoder: Decoder) -> dict[str, Any]:
    return {
        "row": number,
        "id": row.id,
        "source": row.source,
        "tokens": len(row.input_ids),
        "trained_tokens": int(row.assistant_masks.sum()),
        "segments": [
            {"trained": trained, "text": text} for trained, text in decoder.segments(row.input_ids, row.assistant_masks)
        ],
    }


def _selected(
    dataset_dir: Path, split: str, reader: SplitReader, selection: Selection, manifest: Manifest
) -> Iterator[tuple[int, Row]]:
    if selection.pack is not None:
        yield from _pack_rows(dataset_dir, split, reader, selection.pack, manifest)
        return
    if selection.id is not None or selection.source is not None:
        yield _find(reader, selection, split)
        return
    number = selection.row or 0
    if not 0 <= number < len(reader):
        if selection.row is None:
            return
        raise SetupError(f"--row {number}: the {split} split has {len(reader):,} rows", remedy="rows count from 0")
    yield number, reader.row(number)


def _find(reader: SplitReader, selection: Selection, split: str) -> tuple[int, Row]:
    """The first row with the wanted id or source."""
    column, wanted = ("id", selection.id) if selection.id is not None else ("source", selection.source)
    first = 0
    for batch in reader.batches():
        values = batch.column(column).to_pylist()
        if wanted in values:
            number = first + values.index(wanted)
            return number, reader.row(number)
        first += batch.num_rows
    raise SetupError(f"--{column} {wanted}: not in the {split} split", remedy="see `dft-prep inspect` without it")


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
