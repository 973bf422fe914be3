"""`dft-prep validate`: every finding of every file, in order, as they come; a build's own judgement, without a build.

Called by `cli`. With a tokenizer the records are rendered and encoded too, so that template refusals, empty masks and
lengths are found.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import msgspec

from dft_common.errors import EXIT_BAD_DATA, DataError, SetupError
from dft_common.flags import let_go_of_stdout
from dft_common.logs import get_logger
from dft_common.records import Finding
from dft_prep.codes.severities import Severities, parse_severities
from dft_prep.codes.table import CODES
from dft_prep.judge.decontaminate import load_ngrams
from dft_prep.pipeline.engine import default_workers, run_units
from dft_prep.pipeline.progress import Progress
from dft_prep.reconcile.fields import field_uses
from dft_prep.reconcile.reconciliation import source_fields
from dft_prep.sources.named import Source, resolve_sources
from dft_prep.sources.units import Unit, plan_units
from dft_prep.validate.baseline import finding_fingerprint, read_baseline
from dft_prep.validate.seen import Duplicate, Seen
from dft_prep.validate.summary import Summary, summary_text
from dft_prep.validate.survey import Portion, Room, SurveyContext, SurveyJob, file_finding
from dft_prep.validate.writers import FindingWriter, make_writer

if TYPE_CHECKING:
    from dft_prep.pipeline.work import WorkContext

_HELD_FINDINGS = 10_000
"""Findings of units that finished early, waiting for their turn; beyond that they are only counted."""


_BUILD_FLAGS = (
    "data_files",
    "tokenizer",
    "chat_template",
    "add_chatml_tokens",
    "train_on",
    "unroll_turns",
    "chat_template_kwargs",
    "error",
    "warn",
    "ignore",
)


class ValidateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The flags of `dft-prep validate`, by their names."""

    data_files: tuple[Any, ...]
    tokenizer: str | None = None
    chat_template: str | None = None
    add_chatml_tokens: bool = False
    train_on: Literal["all", "last"] = "all"
    unroll_turns: bool = False
    chat_template_kwargs: str | None = None
    unsupported_tools: Literal["text", "quarantine", "error"] = "text"
    special_tokens_in_text: Literal["encode", "quarantine", "error"] = "encode"
    template_date: str | None = None
    max_length: int | None = None
    error: tuple[str, ...] = ()
    warn: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    decontaminate: tuple[str, ...] = ()
    baseline: str | None = None
    format: Literal["text", "json", "jsonl", "github", "sarif", "junit"] = "text"
    output: str | None = None
    max_errors: int = 100
    strict: bool = False
    preprocessing_num_workers: int | None = None


def run_validate(options: ValidateOptions) -> int:
    """Validate, print, and return the exit code: 1 where there is an error (with --strict, a warning)."""
    severities = parse_severities(options.error, options.warn, options.ignore)
    known = read_baseline(options.baseline) if options.baseline is not None else frozenset()
    sources = resolve_sources(options.data_files)
    if options.output is None:
        if options.format != "text" and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as these formats are, whatever the locale
        summary = _Validation(options, severities, known, sources, sys.stdout).run()
    else:
        try:
            with Path(options.output).open("w", encoding="utf-8", errors="backslashreplace") as out:
                summary = _Validation(options, severities, known, sources, out).run()
        except OSError as error:
            raise SetupError(f"--output {options.output}: {error.strerror}", remedy="give a file to write") from None
    sys.stderr.write(summary_text(summary) + "\n")
    return EXIT_BAD_DATA if any(summary.severities.get(severity) for severity in failing(options)) else 0


def failing(options: ValidateOptions) -> tuple[str, ...]:
    """The severities that fail a validation."""
    return ("error", "warning") if options.strict else ("error",)


class _Planned(msgspec.Struct, frozen=True):
    unit: Unit
    source: int
    file: int
    """Numbers the files of all sources."""


class _Validation:
    """A validation while it runs: what was found so far, and what is to be shown next."""

    def __init__(
        self,
        options: ValidateOptions,
        severities: Severities,
        known: frozenset[str],
        sources: list[Source],
        out: TextIO,
    ) -> None:
        self._options, self._severities, self._known, self._sources = options, severities, known, sources
        self._out = out
        self._writer: FindingWriter = make_writer(options.format, out, failing(options))
        self._summary = Summary()
        self._seen = Seen()
        self._room = Room(options.max_errors)
        self._held, self._most_held = 0, max(_HELD_FINDINGS, options.max_errors)
        self._planned: list[_Planned] = []
        self._lines_before: dict[int, int] = {}
        """By unit: lines of its file before it, where there are any."""
        self._fields: list[list[list[tuple[str, str, str, int]]]] = [[] for _ in sources]
        self._formats: dict[int, Counter[str]] = {}
        """By file."""

    def run(self) -> Summary:
        """Raises DataError where a build would end before its first record."""
        self._plan()
        units = [planned.unit for planned in self._planned]
        context = SurveyContext(
            severities=self._severities,
            known=self._known,
            most=self._options.max_errors,
            encoding=self._encoding(units),
            max_length=self._options.max_length,
            contamination=load_ngrams(self._options.decontaminate),
        )
        workers = self._options.preprocessing_num_workers or default_workers()
        waiting: dict[int, list[Portion]] = {}
        front = 0
        with Progress(sum(unit.size for unit in units)) as progress:
            for number, portion in run_units(units, SurveyJob(context), workers, in_order=True):
                progress.advance(portion.size, portion.records, portion.tokens)
                self._count(number, portion)
                # What is found in units that finish early waits for its turn; of too much only the counts are kept.
                if number != front and self._held + len(portion.found) > self._most_held:
                    portion.found.clear()
                self._held += len(portion.found)
                waiting.setdefault(number, []).append(portion)
                front = self._show_in_order(front, waiting)
        self._show_duplicates()
        return self._finish()

    def _plan(self) -> None:
        file_number = 0
        for source_number, source in enumerate(self._sources):
            for file in source.files:
                self._summary.files.append(file.shown)
                try:
                    for unit in plan_units(file, source.name, source.reading):
                        self._planned.append(_Planned(unit, source_number, file_number))
                except DataError as error:
                    self._add(file_finding(file.shown, error), b"")
                file_number += 1

    def _encoding(self, units: list[Unit]) -> WorkContext | None:
        """How a build with these flags would encode; its checks at the start are made here too."""
        options = self._options
        if options.tokenizer is None:
            return None
        # Here, so that a validation without a tokenizer starts without them.
        from dft_prep.pipeline.learn import learn, sample
        from dft_prep.pipeline.stops import stop_warnings
        from dft_prep.pipeline.work import work_context
        from dft_prep.recipe import BuildOptions, make_recipe, parse_date

        flags = {name: getattr(options, name) for name in _BUILD_FLAGS}
        recipe = make_recipe(
            BuildOptions(
                **flags,
                output_dir="",
                # What stops a build at its first record is a finding like any other here.
                unsupported_tools="quarantine" if options.unsupported_tools == "error" else options.unsupported_tools,
                special_tokens_in_text="quarantine"
                if options.special_tokens_in_text == "error"
                else options.special_tokens_in_text,
            ),
            parse_date(options.template_date or datetime.date.today().isoformat()),
        )
        encoder, template = learn(recipe, sample(units), "auto")
        for warning in stop_warnings(recipe.tokenizer, template.end_of_turn):
            get_logger().warning("%s", warning)
        return work_context(recipe, encoder.encoder.name, Path())

    def _count(self, number: int, portion: Portion) -> None:
        summary, planned = self._summary, self._planned[number]
        summary.records += portion.records
        summary.good += portion.good
        summary.known += portion.known
        for (code, severity), times in portion.codes.items():
            summary.count(code, severity, times)
        if self._options.tokenizer is not None:
            tokens = summary.tokens
            tokens["total"] = tokens.get("total", 0) + portion.tokens
            tokens["trained"] = tokens.get("trained", 0) + portion.trained
            tokens["longest"] = max(tokens.get("longest", 0), portion.longest)
        portion.seen["unit"] = number
        self._seen.add(portion.seen)
        portion.seen = portion.seen[:0]  # what waits for its turn holds no more than its findings
        if portion.lines >= 0:
            self._fields[planned.source].append(portion.fields)
            formats = self._formats.setdefault(planned.file, Counter())
            formats.update({form: times for form, path, _, times in portion.fields if not path})

    def _show_in_order(self, front: int, waiting: dict[int, list[Portion]]) -> int:
        """Show what has come of the unit whose turn it is, and of those behind it when it is through."""
        while portions := waiting.pop(front, None):
            for portion in portions:
                self._held -= len(portion.found)
                for found in portion.found:
                    self._show(self._in_file(found.finding, front), found.fingerprint)
            if portions[-1].lines < 0:
                break
            self._through(front, portions[-1].lines)
            front += 1
        return front

    def _through(self, number: int, lines: int) -> None:
        planned = self._planned[number]
        following = self._planned[number + 1] if number + 1 < len(self._planned) else None
        if following is not None and following.file == planned.file:
            self._lines_before[number + 1] = self._lines_before.get(number, 0) + lines
            return
        formats = self._formats[planned.file]
        if len(formats) > 1:
            shares = ", ".join(f"{name} {times:,}" for name, times in formats.most_common())
            self._note(planned.unit.file.shown, "mixed_shapes", f"records of several shapes: {shares}")

    def _in_file(self, finding: Finding, number: int) -> Finding:
        # What is wrong with a file as a whole stands at its first line, whichever unit came upon it.
        before = self._lines_before.get(number, 0) if CODES[finding.code].scope != "file" else 0
        return msgspec.structs.replace(finding, line=finding.line + before) if before else finding

    def _show_duplicates(self) -> None:
        severity = self._severities.of("duplicate")
        if severity == "ignore":
            return
        room = self._options.max_errors - self._room.shown
        count, found = self._seen.count_and_first(sys.maxsize if self._known else max(0, room))
        self._summary.count("duplicate", severity, count - len(found))
        for duplicate in found:
            self._add(self._duplicate_finding(duplicate, severity), duplicate.record["low"].tobytes())

    def _duplicate_finding(self, duplicate: Duplicate, severity: Any) -> Finding:
        (file, line), (first_file, first_line) = map(self._place, duplicate)
        return Finding(
            file=file,
            line=line,
            column=1,
            byte_offset=int(duplicate.record["byte_offset"]),
            code="duplicate",
            severity=severity,
            path="$",
            message=f"the same conversation as {first_file}:{first_line}",
            help=CODES["duplicate"].remedy,
        )

    def _place(self, row: Any) -> tuple[str, int]:
        """File and line of a record. row: of `SEEN_DTYPE`."""
        unit = int(row["unit"])
        return self._planned[unit].unit.file.shown, int(row["line"]) + self._lines_before.get(unit, 0)

    def _note(self, file: str, code: str, message: str) -> None:
        severity = self._severities.of(code)
        if severity != "ignore":
            about = {"file": file, "line": 1, "column": 1, "byte_offset": 0, "path": "$", "help": CODES[code].remedy}
            self._add(Finding(**about, code=code, severity=severity, message=message), b"")

    def _add(self, finding: Finding, raw: bytes) -> None:
        """Count and show a finding that no unit reported."""
        fingerprint = finding_fingerprint(finding, raw)
        if fingerprint in self._known:
            self._summary.known += 1
            return
        self._summary.count(finding.code, finding.severity, 1)
        self._show(finding, fingerprint)

    def _show(self, finding: Finding, fingerprint: str) -> None:
        if self._room.takes(finding):
            with _reader_may_leave():
                self._writer.add(finding, fingerprint)

    def _finish(self) -> Summary:
        summary = self._summary
        summary.sources = [
            source_fields(source.name, field_uses(counts, source.reading))
            for source, counts in zip(self._sources, self._fields, strict=True)
        ]
        summary.hidden = sum(times for name, times in summary.severities.items() if name != "info") - self._room.telling
        with _reader_may_leave():
            self._writer.close(summary)
            self._out.flush()
        return summary


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Where the reader of stdout is gone (`| head`), the exit code still says what the data is."""
    try:
        yield
    except BrokenPipeError:
        let_go_of_stdout()
