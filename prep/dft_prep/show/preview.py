"""`dft-prep preview`: what a build would train, from the data itself, before any build.

Called by `cli`. Records that would be left out are shown with their reason.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from itertools import islice

import numpy as np

from dft_common.errors import DataError
from dft_common.records import Finding
from dft_prep.codes.severities import AS_CODED
from dft_prep.encode.batch import BatchEncoder
from dft_prep.encode.encoders import ReferenceEncoder
from dft_prep.judge.examine import Examiner
from dft_prep.judge.ngrams import make_ngrams
from dft_prep.pipeline.learn import learn
from dft_prep.recipe import BuildOptions, make_recipe
from dft_prep.show.printing import Shown, print_json, print_text
from dft_prep.show.segments import Decoder
from dft_prep.sources.named import Source, resolve_sources
from dft_prep.sources.readers import RawRecord, UnitReader
from dft_prep.sources.units import plan_units


def preview(options: BuildOptions, number: int, output_format: str, *, tokens: bool) -> None:
    """Print the first conversations of each source in turn, `number` in all, as a build would store them."""
    recipe = make_recipe(options, datetime.date.today())
    encoder, _ = learn(recipe, [], ReferenceEncoder.name)
    decoder = Decoder(recipe.tokenizer)
    streams = [_shown(source, encoder, decoder, tokens) for source in resolve_sources(options.data_files)]
    items = list(islice(_in_turn(streams), number))
    if not items:
        raise DataError("nothing to show: the files hold no records", remedy="check --data_files")
    if output_format == "json":
        print_json([item.as_object() for item in items])
        return
    print_text(items, borders=tokens)


def _in_turn(streams: list[Iterator[Shown]]) -> Iterator[Shown]:
    while streams:
        for stream in list(streams):
            item = next(stream, None)
            if item is None:
                streams.remove(stream)
            else:
                yield item


def _shown(source: Source, encoder: BatchEncoder, decoder: Decoder, tokens: bool) -> Iterator[Shown]:
    for file in source.files:
        for unit in plan_units(file, source.name, source.reading):
            examine = Examiner(unit, AS_CODED, make_ngrams([]), encoder)
            for raw in UnitReader(unit):
                yield from _record(raw, examine, source.name, encoder, decoder, tokens)


def _record(
    raw: RawRecord, examine: Examiner, source: str, encoder: BatchEncoder, decoder: Decoder, tokens: bool
) -> Iterator[Shown]:
    """The rows of one record, or why it would be left out."""
    shown = examine.judge.shown
    where = f"{shown}, byte {raw.byte_offset:,}" if raw.byte_offset >= 0 else shown
    about = {"file": shown, "byte_offset": raw.byte_offset, "source": source}
    examined = examine(raw)
    if isinstance(examined, Finding):
        left_out = {"code": examined.code, "path": examined.path, "message": examined.message}
        title = f"--- {where}: left out, {examined.code} {examined.path}: {examined.message}"
        yield Shown(title=title, about={**about, "left_out": left_out})
        return
    for rendered in examined.rows:
        batch = encoder.encode([rendered])
        trained = int(np.count_nonzero(batch.weights))
        notes = f" ({', '.join(rendered.notes)})" if rendered.notes else ""
        yield Shown(
            title=f"--- {where}: {len(batch.input_ids):,} tokens, {trained:,} trained{notes}",
            about={**about, "tokens": len(batch.input_ids), "trained_tokens": trained, "notes": list(rendered.notes)},
            segments=decoder.segments(batch.input_ids, batch.weights),
            tokens=decoder.tokens(batch.input_ids, batch.weights) if tokens else None,
            edges=decoder.edges(batch.input_ids, batch.weights),
        )
