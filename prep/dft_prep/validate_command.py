"""`dft-prep validate`: every finding of every file, as they come; a build's own judgement, without a build.

Called by `cli`. With a tokenizer the records are rendered and encoded too, so that template refusals, empty masks and
lengths are found.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec

from dft_common.errors import EXIT_BAD_DATA, DataError, SetupError
from dft_common.records import Conversation, Finding
from dft_prep.codes import CODES
from dft_prep.encode import BatchEncoder
from dft_prep.encoders import ReferenceEncoder, choose_encoder
from dft_prep.findings import Summary, as_github, as_json, as_text, summary_text
from dft_prep.progress import Progress
from dft_prep.readers import RawRecord, UnitReader
from dft_prep.recipe import parse_date, parse_template_kwargs, prepare_tokenizer
from dft_prep.render import Rendered, Renderer, RenderOptions, RenderRefusal
from dft_prep.sources import Source, resolve_sources
from dft_prep.units import Unit, plan_units
from dft_prep.validate import Judge, record_finding
from dft_prep.work import refusal_finding

_BATCH_ROWS = 200


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
    format: Literal["text", "json", "github"] = "text"
    output: str | None = None
    max_errors: int = 100
    strict: bool = False


class _Encoding:
    """Renders and encodes good records, and finds what a tokenizer is needed to find."""

    def __init__(self, options: ValidateOptions, summary: Summary) -> None:
        assert options.tokenizer is not None
        tokenizer, template = prepare_tokenizer(options.tokenizer, options.chat_template, options.add_chatml_tokens)
        date = parse_date(options.template_date or datetime.date.today().isoformat())
        render = RenderOptions(
            train_on=options.train_on,
            unroll_turns=options.unroll_turns,
            chat_template_kwargs=parse_template_kwargs(options.chat_template_kwargs),
            # What stops a build at its first record is a finding like any other here.
            unsupported_tools="quarantine" if options.unsupported_tools == "error" else options.unsupported_tools,
            special_tokens_in_text="quarantine"
            if options.special_tokens_in_text == "error"
            else options.special_tokens_in_text,
        )
        self.renderer = Renderer(template.source, tokenizer, date, render)
        reference = ReferenceEncoder(tokenizer)
        engine = choose_encoder("auto", tokenizer, reference, [])
        self.encoder = BatchEncoder(self.renderer, tokenizer, engine, reference)
        self.max_length = options.max_length
        self.summary = summary
        self.waiting: list[tuple[Rendered, RawRecord, str]] = []
        summary.tokens = {"total": 0, "trained": 0, "longest": 0}

    def add(self, conversation: Conversation, raw: RawRecord, shown: str) -> Iterator[Finding]:
        try:
            rows = self.renderer.rows(conversation)
        except RenderRefusal as refusal:
            yield refusal_finding(refusal, raw, shown)
            return
        self.summary.good += 1
        self.waiting += [(rendered, raw, shown) for rendered in rows]
        if len(self.waiting) >= _BATCH_ROWS:
            yield from self.flush()

    def flush(self) -> Iterator[Finding]:
        if not self.waiting:
            return
        batch = self.encoder.encode([rendered for rendered, _, _ in self.waiting])
        lengths = (batch.offsets[1:] - batch.offsets[:-1]).tolist()
        tokens = self.summary.tokens
        tokens["total"] += len(batch.input_ids)
        tokens["trained"] += int((batch.weights > 0).sum())
        tokens["longest"] = max(tokens["longest"], *lengths)
        for (_, raw, shown), length in zip(self.waiting, lengths, strict=True):
            if self.max_length is not None and length > self.max_length:
                message = f"{length:,} tokens, --max_length is {self.max_length:,}"
                yield record_finding(raw, shown, "overlong", "$.messages", message)
        self.waiting.clear()


def _unreadable(shown: str, error: DataError) -> Finding:
    """A file that cannot be read at all ends a build; here it is one finding among the others."""
    return Finding(
        file=shown,
        line=1,
        column=1,
        byte_offset=0,
        code="unreadable_file",
        severity=CODES["unreadable_file"].severity,
        path="$",
        message=error.message.removeprefix(f"{shown}: "),
        help=error.remedy,
    )


def _findings(sources: list[Source], summary: Summary, encoding: _Encoding | None) -> Iterator[Finding]:
    planned: list[tuple[str, list[Unit]]] = []
    for source in sources:
        for file in source.files:
            try:
                planned.append((source.name, plan_units(file, source.name)))
            except DataError as error:
                yield _unreadable(file.shown, error)
    size = sum(unit.size for _, units in planned for unit in units)
    with Progress(size) as progress:
        for name, units in planned:
            lines = 0
            for unit in units:
                reader = UnitReader(unit)
                try:
                    yield from _unit_findings(reader, unit, name, lines, summary, encoding, progress)
                except DataError as error:
                    yield _unreadable(unit.file.shown, error)
                lines += reader.lines
    if encoding is not None:
        yield from encoding.flush()


def _unit_findings(
    reader: UnitReader,
    unit: Unit,
    source: str,
    lines: int,
    summary: Summary,
    encoding: _Encoding | None,
    progress: Progress,
) -> Iterator[Finding]:
    before = summary.records
    judge = Judge(unit.file.shown, unit.reading)
    for record in reader:
        raw = msgspec.structs.replace(record, line=record.line + lines) if lines else record
        summary.records += 1
        judged = judge(raw)
        if isinstance(judged, Finding):
            yield judged
            continue
        summary.count_fields(source, judged.ignored)
        yield from judged.notes
        if encoding is None:
            summary.good += 1
        else:
            yield from encoding.add(judged.conversation, raw, unit.file.shown)
    progress.advance(unit.size, summary.records - before, 0)


def run_validate(options: ValidateOptions) -> int:
    """Validate, print, and return the exit code: 1 where there is an error (with --strict, a warning)."""
    sources = resolve_sources(options.data_files)
    summary = Summary()
    encoding = _Encoding(options, summary) if options.tokenizer is not None else None
    if options.output is None:
        _write(sources, summary, encoding, options, sys.stdout)
    else:
        try:
            with Path(options.output).open("w", encoding="utf-8") as out:
                _write(sources, summary, encoding, options, out)
        except OSError as error:
            raise SetupError(f"--output {options.output}: {error.strerror}", remedy="give a file to write") from None
    sys.stderr.write(summary_text(summary) + "\n")
    failing = ("error", "warning") if options.strict else ("error",)
    return EXIT_BAD_DATA if any(summary.severities.get(severity) for severity in failing) else 0


def _write(
    sources: list[Source], summary: Summary, encoding: _Encoding | None, options: ValidateOptions, out: TextIO
) -> None:
    kept: list[Finding] = []
    shown = 0
    for finding in _findings(sources, summary, encoding):
        summary.count(finding)
        shown += 1
        if shown > options.max_errors:
            continue
        if options.format == "json":
            kept.append(finding)
        else:
            out.write((as_text(finding) if options.format == "text" else as_github(finding)) + "\n")
    if options.format == "json":
        out.write(as_json(kept, summary))
    elif shown > options.max_errors:
        sys.stderr.write(f"{shown - options.max_errors:,} more findings are not shown (--max_errors)\n")
