"""One work unit -> what is found in it: findings, counts, hashes, a portion at a time. What a validation's worker does.

Called by `engine`, in this process or in a pool, for `validate.command`.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dft_common.errors import DataError
from dft_common.records import Finding
from dft_prep.codes.severities import Severities
from dft_prep.codes.table import CODES
from dft_prep.judge.examine import Examiner
from dft_prep.judge.judgement import record_finding
from dft_prep.judge.ngrams import Ngrams
from dft_prep.shards.split import same_key
from dft_prep.sources.files import FileError
from dft_prep.sources.readers import FileNote, RawRecord, UnitReader
from dft_prep.sources.units import Unit
from dft_prep.validate.baseline import finding_fingerprint
from dft_prep.validate.seen import SEEN_DTYPE, seen_rows

if TYPE_CHECKING:
    from dft_prep.encode.batch import BatchEncoder
    from dft_prep.pipeline.work import WorkContext
    from dft_prep.template.render import Rendered

_PORTION_SECONDS = 0.5
_CLOCK_EVERY = 256
_BATCH_CHARACTERS = 1 << 20


class SurveyContext(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker process needs to know; sent to it once."""

    severities: Severities
    known: frozenset[str]
    """Fingerprints of findings that are let through (--baseline)."""
    most: int
    """Findings of a unit that are worth sending: no more will be shown."""
    encoding: WorkContext | None
    """With a tokenizer: how a build would encode."""
    max_length: int | None
    contamination: Ngrams


class Found(msgspec.Struct, frozen=True):
    finding: Finding
    """Its line counts from the unit's start."""
    fingerprint: str


class Portion(msgspec.Struct, kw_only=True):
    """What was found in a stretch of a unit."""

    records: int = 0
    good: int = 0
    size: int = 0
    """Bytes of the file that were passed."""
    found: list[Found] = []
    """The first of them in the unit, at most `most` in all."""
    codes: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter)
    """Findings by (code, severity), those that are not sent included."""
    known: int = 0
    """Findings that the baseline lets through."""
    seen: np.ndarray = msgspec.field(default_factory=lambda: np.zeros(0, SEEN_DTYPE))
    """[good records] SEEN_DTYPE, without the unit."""
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    lines: int = -1
    """In the unit's last portion: its newlines."""
    fields: list[tuple[str, str, str, int]] = []
    """In the unit's last portion: `FieldCounts.counts()`."""


class Room:
    """How many findings are shown: `most` errors, and others as long as there is room for any."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._errors = self.shown = 0
        self.telling = 0
        """Errors and warnings shown."""
        self._infos: set[tuple[str, str, str]] = set()

    def takes(self, finding: Finding) -> bool:
        """Whether a finding, the next in order, is one to show. An info is shown at its first place in a file."""
        if finding.severity == "info":
            about = (finding.file, finding.code, finding.path if finding.code == "unused_field" else "")
            if about in self._infos:
                return False
            self._infos.add(about)
        error = finding.severity == "error"
        if self._errors >= self._most if error else self.shown >= self._most:
            return False
        self._errors += error
        self.shown += 1
        self.telling += finding.severity != "info"
        return True


class SurveyJob(msgspec.Struct, frozen=True):
    """What `engine` sends to each worker process."""

    context: SurveyContext

    def start(self) -> Callable[[Unit], Iterator[Portion]]:
        context = self.context
        encoder = None
        watch: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        if context.encoding is not None:
            # Here, so that a validation without a tokenizer starts without them.
            from dft_prep.pipeline.work import make_batch_encoder
            from dft_prep.template.sandbox import WATCH

            encoder, watch = make_batch_encoder(context.encoding), WATCH.on

        def run(unit: Unit) -> Iterator[Portion]:
            return _Survey(context, encoder, watch, unit).portions()

        return run


class _Survey:
    """A unit while it is read."""

    def __init__(
        self,
        context: SurveyContext,
        encoder: BatchEncoder | None,
        watch: Callable[[], AbstractContextManager[Any]],
        unit: Unit,
    ) -> None:
        """watch: what limits how long a render may take."""
        self._context, self._encoder, self._watch, self._unit = context, encoder, watch, unit
        self._reader = UnitReader(unit)
        self._examine = Examiner(unit, context.severities, context.contamination, encoder)
        self._portion = Portion()
        self._keys: list[bytes] = []
        self._lines, self._offsets = array("q"), array("q")
        self._rows: list[tuple[Rendered, RawRecord]] = []
        self._characters = self._passed = 0
        self._room = Room(context.most)

    def portions(self) -> Iterator[Portion]:
        records = iter(self._reader)
        while self._fill(records):
            yield self._hand_over()
        self._encode()
        for note in self._reader.notes:
            self._add_note(note)
        for finding in self._examine.judge.unused.values():
            self._add(finding, b"")
        self._portion.lines = self._reader.lines
        self._portion.fields = self._examine.judge.field_counts()
        yield self._hand_over()

    def _fill(self, records: Iterator[RawRecord]) -> bool:
        """Examine records for some time; False when there are no more."""
        portion, examine = self._portion, self._examine
        until = time.monotonic() + _PORTION_SECONDS
        keys, lines, offsets = self._keys, self._lines, self._offsets
        read = good = 0
        more = False
        try:
            with self._watch():
                for raw in records:
                    read += 1
                    examined = examine(raw)
                    if isinstance(examined, Finding):
                        self._add(examined, raw.data)
                    else:
                        good += 1
                        keys.append(same_key(examined.conversation))
                        lines.append(raw.line)
                        offsets.append(raw.byte_offset)
                        if examined.notes:
                            for note in examined.notes:
                                self._add(note, raw.data)
                        if examined.rows:
                            self._add_rows(examined.rows, raw)
                    if not read % _CLOCK_EVERY and time.monotonic() > until:
                        more = True
                        break
        except FileError as error:
            self._add(file_finding(self._unit.file.shown, error), b"")
        portion.records, portion.good = read, good
        return more

    def _add_rows(self, rows: list[Rendered], raw: RawRecord) -> None:
        self._rows += [(rendered, raw) for rendered in rows]
        self._characters += sum(len(rendered.text) for rendered in rows)
        if self._characters >= _BATCH_CHARACTERS:
            self._encode()

    def _encode(self) -> None:
        if self._encoder is None or not self._rows:
            return
        batch = self._encoder.encode([rendered for rendered, _ in self._rows])
        lengths = (batch.offsets[1:] - batch.offsets[:-1]).tolist()
        portion = self._portion
        portion.tokens += len(batch.input_ids)
        portion.trained += int((batch.weights > 0).sum())
        portion.longest = max(portion.longest, *lengths)
        limit, severity = self._context.max_length, self._context.severities.of("overlong")
        for (_, raw), length in zip(self._rows, lengths, strict=True):
            if limit is not None and length > limit and severity != "ignore":
                message = f"{length:,} tokens, --max_length is {limit:,}"
                shown = self._unit.file.shown
                self._add(record_finding(raw, shown, "overlong", "$", message, severity=severity), raw.data)
        self._rows, self._characters = [], 0

    def _add_note(self, note: FileNote) -> None:
        severity = self._context.severities.of(note.code)
        if severity != "ignore":
            finding = Finding(
                file=self._unit.file.shown,
                line=note.line,
                column=1,
                byte_offset=note.byte_offset,
                code=note.code,
                severity=severity,
                path="$",
                message=note.message,
                help=CODES[note.code].remedy,
            )
            self._add(finding, b"")

    def _add(self, finding: Finding, raw: bytes | dict[str, Any]) -> None:
        fingerprint = finding_fingerprint(finding, raw if isinstance(raw, bytes) else repr(raw).encode())
        if fingerprint in self._context.known:
            self._portion.known += 1
            return
        self._portion.codes[finding.code, finding.severity] += 1
        if self._room.takes(finding):
            self._portion.found.append(Found(finding, fingerprint))

    def _hand_over(self) -> Portion:
        portion, self._portion = self._portion, Portion()
        portion.seen = seen_rows(self._keys, self._lines, self._offsets)
        self._keys, self._lines, self._offsets = [], array("q"), array("q")
        passed = self._unit.size if portion.lines >= 0 else self._reader.passed
        portion.size, self._passed = passed - self._passed, passed
        return portion


def file_finding(shown: str, error: DataError) -> Finding:
    """A file that cannot be read (on) ends a build; in a validation it is one finding among the others."""
    code = error.code if isinstance(error, FileError) else "unreadable_file"
    return Finding(
        file=shown,
        line=1,
        column=1,
        byte_offset=0,
        code=code,
        severity="error",
        path="$",
        message=error.message.removeprefix(f"{shown}: "),
        help=error.remedy or CODES[code].remedy,
    )
