"""One work unit -> one part: read, judge, render, encode, write. What a worker process does.

Called by `engine`, in this process or in a pool. A part is named by the hash of what made it (bytes,
tokenizer, template, options), written to a temporary name and renamed; its counts are written last, so that
a part with counts is whole, and a build that was killed finds it again.
"""

from __future__ import annotations

import datetime
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from dft_common.fingerprint import hash_object
from dft_common.manifest import write_atomically
from dft_common.records import Finding
from dft_common.schema import TokenDtype
from dft_prep.codes.severities import Severities
from dft_prep.encode.batch import CHECKED_ONE_IN, BatchEncoder
from dft_prep.encode.encoders import ReferenceEncoder, make_encoder
from dft_prep.judge.examine import Examiner
from dft_prep.judge.judgement import quarantine_line
from dft_prep.judge.ngrams import Ngrams
from dft_prep.recipe import Recipe
from dft_prep.shards.parts import PartWriter
from dft_prep.shards.rows import Rows
from dft_prep.shards.split import KEY_DTYPE
from dft_prep.sources.readers import RawRecord, UnitReader
from dft_prep.sources.units import Unit, unit_fingerprint
from dft_prep.template.render import Rendered, Renderer, RenderOptions
from dft_prep.template.sandbox import WATCH
from dft_prep.tokenizer_files import TokenizerFiles

_BATCH_CHARACTERS = 1 << 20
_BATCH_ROWS = 1000
_PROGRESS_SECONDS = 1.0
_CLOCK_EVERY = 64


class WorkContext(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker process needs to know; sent to it once."""

    tokenizer: TokenizerFiles
    template_source: str
    date: datetime.date
    render_options: RenderOptions
    encoder: str
    token_dtype: TokenDtype
    encoding_key: str
    parts_dir: Path
    stop_at_first: bool
    severities: Severities
    contamination: Ngrams


def work_context(recipe: Recipe, encoder: str, parts_dir: Path) -> WorkContext:
    """encoder: the name of the one that `learn` chose."""
    return WorkContext(
        tokenizer=recipe.tokenizer,
        template_source=recipe.template.source,
        date=recipe.date,
        render_options=recipe.render_options,
        encoder=encoder,
        token_dtype=recipe.options.token_dtype,
        encoding_key=recipe.encoding_key(),
        parts_dir=parts_dir,
        stop_at_first=recipe.options.on_error == "stop",
        severities=recipe.severities,
        contamination=recipe.contamination,
    )


class PartInfo(msgspec.Struct, kw_only=True):
    """What is in a part, and what was left out of it."""

    read: int = 0
    kept: int = 0
    tokens: int = 0
    left_out: dict[str, int] = {}
    notes: dict[str, int] = {}
    fields: list[tuple[str, str, str, int]] = []
    """`FieldCounts.counts()`."""
    lines: int = 0
    """Newlines in the unit: line numbers in its findings count from the unit's start."""


class Progressed(msgspec.Struct, frozen=True):
    """How far a unit is: bytes of its file, records and tokens so far."""

    size: int = 0
    read: int = 0
    tokens: int = 0


class UnitResult(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    fingerprint: str
    info: PartInfo


def part_path(parts_dir: Path, key: str) -> Path:
    return parts_dir / f"{key}.arrow"


def part_info_path(parts_dir: Path, key: str) -> Path:
    return parts_dir / f"{key}.json"


def part_quarantine_path(parts_dir: Path, key: str) -> Path:
    return parts_dir / f"{key}.quarantine"


class _Part:
    """A part while it is made: the rows of the current batch, the counts, the quarantine."""

    def __init__(self, worker: Worker, key: str) -> None:
        context = worker.context
        self.encoder = worker.encoder
        self.info = PartInfo()
        self.left_out: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.rows: list[Rendered] = []
        self.keys: list[tuple[int, int, int]] = []
        self.characters = 0
        self.writer = PartWriter(part_path(context.parts_dir, key), context.token_dtype)
        self._quarantine_path = part_quarantine_path(context.parts_dir, key)
        self._quarantine_temporary = self._quarantine_path.with_suffix(f".{os.getpid()}.tmp")
        self.quarantine = self._quarantine_temporary.open("wb")

    def add(self, rows: list[Rendered], key: tuple[int, int]) -> None:
        """A conversation's rows, which stay in one batch."""
        for turn, rendered in enumerate(rows):
            self.rows.append(rendered)
            self.keys.append((*key, turn))
            self.characters += len(rendered.text)
        self.info.kept += 1
        if self.characters >= _BATCH_CHARACTERS or len(self.rows) >= _BATCH_ROWS:
            self.flush()

    def leave_out(self, finding: Finding, raw: RawRecord) -> None:
        self.left_out[finding.code] += 1
        self.quarantine.write(quarantine_line(finding, raw))

    def flush(self) -> None:
        if not self.rows:
            return
        batch = self.encoder.encode(self.rows)
        rows = Rows(
            input_ids=batch.input_ids,
            weights=batch.weights,
            offsets=batch.offsets,
            keys=np.array(self.keys, KEY_DTYPE),
        )
        self.writer.add(rows)
        self.info.tokens += len(rows.input_ids)
        self.rows, self.keys, self.characters = [], [], 0

    def close(self, lines: int, fields: list[tuple[str, str, str, int]]) -> PartInfo:
        self.flush()
        self.writer.close()
        self.quarantine.close()
        self._quarantine_temporary.replace(self._quarantine_path)
        self.info.left_out, self.info.notes = dict(self.left_out), dict(self.notes)
        self.info.fields, self.info.lines = fields, lines
        assert self.info.read == self.info.kept + sum(self.left_out.values())
        return self.info

    def abandon(self) -> None:
        self.writer.abandon()
        self.quarantine.close()
        self._quarantine_temporary.unlink(missing_ok=True)


def make_batch_encoder(context: WorkContext) -> BatchEncoder:
    """Learn the template and load the tokenizer, in a worker process."""
    renderer = Renderer(context.template_source, context.tokenizer, context.date, context.render_options)
    reference = ReferenceEncoder(context.tokenizer)
    encoder = make_encoder(context.encoder, context.tokenizer, reference)
    return BatchEncoder(renderer, context.tokenizer, encoder, reference)


class EncodeJob(msgspec.Struct, frozen=True):
    """What `engine` sends to each worker process."""

    context: WorkContext

    def start(self) -> Callable[[Unit], Iterator[Progressed | Finding | UnitResult]]:
        return Worker(self.context, make_batch_encoder(self.context)).run


class Worker:
    """Ready for units."""

    def __init__(self, context: WorkContext, encoder: BatchEncoder) -> None:
        self.context, self.encoder = context, encoder

    def part_key(self, unit: Unit, fingerprint: str) -> str:
        context = self.context
        # The start too: findings hold byte offsets.
        made_by = [
            context.encoding_key,
            context.encoder,
            unit.kind,
            unit.start,
            fingerprint,
            msgspec.to_builtins(unit.reading),
            sorted(context.severities.changed.items()),
            context.contamination.fingerprint,
        ]
        return hash_object(made_by)

    def run(self, unit: Unit) -> Iterator[Progressed | Finding | UnitResult]:
        """Make the part of `unit`, or find it made. Raises DataError, or EncoderMismatch.

        Yields now and then how far it is, and then its result; or, with --on_error stop, the finding that stopped it
        (its line counted from the unit's start).
        """
        fingerprint = unit_fingerprint(unit)
        key = self.part_key(unit, fingerprint)
        info_path = part_info_path(self.context.parts_dir, key)
        try:
            info = msgspec.json.decode(info_path.read_bytes(), type=PartInfo)
            if info.left_out and self.context.stop_at_first:
                yield self._first_left_out(key)
            yield UnitResult(key=key, fingerprint=fingerprint, info=info)
            return
        except (FileNotFoundError, msgspec.MsgspecError):
            pass
        part = _Part(self, key)
        try:
            reader = UnitReader(unit)
            examine = Examiner(unit, self.context.severities, self.context.contamination, self.encoder)
            due = time.monotonic() + _PROGRESS_SECONDS
            with WATCH.on():
                for raw in reader:
                    part.info.read += 1
                    finding = self._one(part, raw, examine)
                    if part.info.read % _CLOCK_EVERY == 0 and time.monotonic() > due:
                        due = time.monotonic() + _PROGRESS_SECONDS
                        yield Progressed(reader.passed, part.info.read, part.info.tokens)
                    if finding is not None and self.context.stop_at_first:
                        part.abandon()
                        yield finding
                        return
            info = part.close(reader.lines, examine.judge.field_counts())
        except BaseException:
            part.abandon()
            raise
        write_atomically(info_path, msgspec.json.encode(info))
        yield UnitResult(key=key, fingerprint=fingerprint, info=info)

    def _first_left_out(self, key: str) -> Finding:
        with part_quarantine_path(self.context.parts_dir, key).open("rb") as lines:
            return msgspec.json.decode(next(lines), type=Finding)

    def _one(self, part: _Part, raw: RawRecord, examine: Examiner) -> Finding | None:
        """Add a record to the part, or to its quarantine for what is returned."""
        examined = examine(raw)
        if isinstance(examined, Finding):
            part.leave_out(examined, raw)
            return examined
        part.notes.update({note.code for note in examined.notes})
        if examined.key[0] % CHECKED_ONE_IN == 0:
            for rendered in examined.rows:
                self.encoder.check(rendered)
        part.add(examined.rows, examined.key)
        return None
