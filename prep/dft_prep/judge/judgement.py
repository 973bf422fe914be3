"""The one judgement on a raw record: a canonical conversation, or a finding that says what is wrong.

Called by `work` (build), `preview` and `validate.command`, so that they can never disagree. RFC 8259
decides what is JSON: msgspec decodes, and the standard library judges what msgspec refuses.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from dft_common.records import Conversation, Finding
from dft_prep.codes.severities import AS_CODED, Severities
from dft_prep.codes.table import CODES, Severity
from dft_prep.judge.illegal import Illegal, by_the_standard, is_too_deep
from dft_prep.judge.plain import PlainReader
from dft_prep.judge.repeats import find_repeated, may_repeat
from dft_prep.judge.rules import find_oddities
from dft_prep.reconcile.converters import RecordError, half_pair, quoted
from dft_prep.reconcile.fields import MOST_PATHS, FieldCounts, Signature, fields_of, may_read, short_name, target_of
from dft_prep.reconcile.formats import LABEL_FIELDS
from dft_prep.reconcile.reading import AS_FOUND, Reading, written_path
from dft_prep.reconcile.record import reconcile
from dft_prep.sources.readers import RawRecord

_decode = msgspec.json.Decoder().decode


class Judged(msgspec.Struct):
    """A good record."""

    conversation: Conversation
    notes: list[Finding]
    """Warnings and infos: they do not leave it out."""
    place: Callable[[int, str], str]
    """(index of a message or -1, part of it) -> its JSON path in the record as its author wrote it."""


class Judge:
    """Judges the records of one unit, and counts the fields of the good ones."""

    def __init__(self, shown: str, reading: Reading = AS_FOUND, severities: Severities = AS_CODED) -> None:
        """shown: what findings call the file."""
        self.shown, self.reading, self.severities = shown, reading, severities
        self._fields = FieldCounts()
        self.unused: dict[str, Finding] = {}
        """The first record with each field that is not used, by the field's path."""
        self._plain = PlainReader() if reading == AS_FOUND else None

    def __call__(self, raw: RawRecord) -> Judged | Finding:
        if raw.problem is not None:
            code, message = raw.problem
            return record_finding(raw, self.shown, code, "$", message)
        if self._plain is not None and isinstance(raw.data, bytes):
            conversation = self._plain.read(raw.data)
            if conversation is not None:
                if self._plain.new is not None:
                    self._note_unused(self._plain.new, raw)
                return self._by_the_rules(conversation, self._plain.kind.place, raw, [], self._plain.escapes)
        return self._ordinarily(raw)

    def _ordinarily(self, raw: RawRecord) -> Judged | Finding:
        """Judge a record that is not of the plain kind, or the first of its kind."""
        if isinstance(raw.data, bytes) and is_too_deep(raw.data):
            return record_finding(raw, self.shown, "too_deep", "$", "nested too deep")
        exact = True
        try:
            value = raw.data if isinstance(raw.data, dict) else _decode(raw.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            assert isinstance(raw.data, bytes)
            exact = False
            try:
                value = by_the_standard(raw.data, cut=raw.cut, is_line=raw.is_line)
            except Illegal as error:
                return _illegal(raw, self.shown, error)
        try:
            notes = self._repeated_keys(value, raw)
            reconciled = reconcile(value, self.reading)
            if not exact or isinstance(raw.data, dict):
                _refuse_unwritable(reconciled.conversation)
                notes += self._beyond_floats(value, raw)
        except RecordError as error:
            return record_finding(raw, self.shown, error.code, error.path, error.message, error.help)
        except RecursionError:
            return record_finding(raw, self.shown, "too_deep", "$", "nested too deep")
        for key in LABEL_FIELDS:
            if reconciled.record.get(key) is False:
                place = written_path(f"$.{key}", self.reading)
                self.note(notes, raw, "unwanted_reply", place, f"`{key}` is false: the reply is not wanted")
        signature = (reconciled.format, fields_of(reconciled.record, reconciled.format))
        if self._fields.add(signature):
            self._note_unused(signature, raw)
        if self._plain is not None and isinstance(raw.data, bytes):
            self._plain.learn(value, reconciled.format)
        return self._by_the_rules(reconciled.conversation, reconciled.place, raw, notes)

    def _by_the_rules(
        self,
        conversation: Conversation,
        place: Callable[[int, str], str],
        raw: RawRecord,
        notes: list[Finding],
        escapes: bool | None = None,
    ) -> Judged | Finding:
        """Good, with what is odd about it; or the first oddity that the recipe calls an error."""
        for odd in find_oddities(conversation, raw.data if isinstance(raw.data, bytes) else None, escapes):
            self.note(notes, raw, odd.code, place(odd.message_index, odd.part), odd.found, odd.help)
        if notes and (bad := first_error(notes)):
            return bad
        return Judged(conversation, notes, place)

    def note(self, notes: list[Finding], raw: RawRecord, code: str, path: str, found: str, help: str = "") -> None:
        """Add a finding to `notes`, as grave as the recipe has it."""
        severity = self.severities.of(code)
        if severity != "ignore":
            notes.append(record_finding(raw, self.shown, code, path, found, help, severity=severity))

    def _repeated_keys(self, value: Any, raw: RawRecord) -> list[Finding]:
        """Notes on keys that stand twice. Raises RecordError for one where the conversation is read from."""
        notes: list[Finding] = []
        if isinstance(raw.data, bytes) and may_repeat(raw.data, value):
            for repeated in find_repeated(raw.data):
                key = repeated.path.rsplit(".", 1)[-1]
                if may_read(self.reading, repeated.field):
                    message = f"the key {quoted(key)} stands twice, and only one can count"
                    raise RecordError("duplicate_key_in_message", repeated.path, message, "keep one of them")
                self.note(notes, raw, "duplicate_keys", repeated.path, f"the key {quoted(key)} stands twice")
        return notes

    def _beyond_floats(self, value: Any, raw: RawRecord) -> list[Finding]:
        notes: list[Finding] = []
        # Infinities of Parquet are no numbers that were written out of range.
        for path in paths_of_infinities(value) if isinstance(raw.data, bytes) else ():
            self.note(notes, raw, "number_out_of_range", path, "a number beyond the range of a float")
        return notes

    def field_counts(self) -> list[tuple[str, str, str, int]]:
        """`FieldCounts.counts()` of the good records so far."""
        if self._plain is not None:
            for signature, times in self._plain.take_counts():
                self._fields.add(signature, times)
        return self._fields.counts()

    def _note_unused(self, signature: Signature, raw: RawRecord) -> None:
        form, fields = signature
        severity = self.severities.of("unused_field")
        for path, kind in fields:
            if kind is type(None) or path in self.unused or severity == "ignore" or target_of(form, path) is not None:
                continue
            if len(self.unused) < MOST_PATHS:
                shown = short_name(written_path(f"$.{path}", self.reading).removeprefix("$."))
                message = f"the field {quoted(shown)} is not used"
                finding = record_finding(raw, self.shown, "unused_field", f"$.{shown}", message, severity=severity)
                self.unused[path] = finding


def first_error(notes: list[Finding]) -> Finding | None:
    """The first of a record's findings that the recipe calls an error: it leaves the record out."""
    return next((note for note in notes if note.severity == "error"), None)


def paths_of_infinities(value: Any, path: str = "$") -> Iterator[str]:
    """JSON paths of the numbers that became infinite when they were read."""
    if isinstance(value, float) and math.isinf(value):
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from paths_of_infinities(item, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from paths_of_infinities(item, f"{path}[{number}]")


def _illegal(raw: RawRecord, shown: str, error: Illegal) -> Finding:
    assert isinstance(raw.data, bytes)
    before = raw.data.decode("utf-8", "replace")[: error.position]
    newlines = before.count("\n")
    line = raw.line + newlines
    column = len(before) - (before.rfind("\n") + 1) + (1 if newlines else raw.column)
    finding = record_finding(raw, shown, error.code, "$", error.message, error.help)
    return msgspec.structs.replace(finding, line=line, column=column)


def _refuse_unwritable(conversation: Conversation) -> None:
    """Raise RecordError for what legal JSON can hold and no dataset: half a surrogate pair, an infinite number."""
    for number, message in enumerate(conversation.messages):
        _refuse_surrogates(message, f"$.messages[{number}]")
    _refuse_surrogates(conversation.tools, "$.tools")
    try:
        json.dumps(conversation.tools, allow_nan=False, default=str)
    except ValueError:
        found = "holds a number beyond the range of a float"
        raise RecordError("bad_tools", "$.tools", found, "write a number that a float can hold") from None


def _refuse_surrogates(value: Any, path: str) -> None:
    try:
        msgspec.json.encode(value, enc_hook=str)
    except UnicodeEncodeError as error:
        raise half_pair(error, path) from None


def record_finding(
    raw: RawRecord,
    shown: str,
    code: str,
    path: str,
    message: str,
    help: str = "",
    *,
    severity: Severity | None = None,
) -> Finding:
    """What is wrong with a record as a whole; `help` and `severity` default to its code's."""
    return Finding(
        file=shown,
        line=raw.line,
        column=raw.column,
        byte_offset=raw.byte_offset,
        code=code,
        severity=severity or CODES[code].severity,
        path=path,
        message=message,
        help=help or CODES[code].remedy,
    )


def quarantine_line(finding: Finding, raw: RawRecord) -> bytes:
    """One line of quarantine.jsonl: the finding, and the record's bytes (as base64 where they are not UTF-8)."""
    entry = msgspec.structs.asdict(finding)
    if isinstance(raw.data, dict):
        entry["raw"] = json.dumps(raw.data, ensure_ascii=False, default=str)
    else:
        try:
            entry["raw"] = raw.data.decode("utf-8")
        except UnicodeDecodeError:
            entry["raw_base64"] = base64.b64encode(raw.data).decode()
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
