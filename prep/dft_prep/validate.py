"""The one judgement on a raw record: a canonical conversation, or a finding that says what is wrong.

Called by `work` (build), `preview` and `validate_command`, so that they can never disagree. RFC 8259
decides what is JSON: msgspec decodes, and the standard library judges what msgspec refuses.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec

from dft_common.records import Conversation, Finding
from dft_prep.codes import CODES, Severity
from dft_prep.converters import RecordError
from dft_prep.readers import RawRecord
from dft_prep.reading import AS_FOUND, Reading
from dft_prep.reconcile import Reconciled, reconcile
from dft_prep.rules import find_oddities
from dft_prep.severities import AS_CODED, Severities

_decode = msgspec.json.Decoder().decode


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A good record."""

    conversation: Conversation
    format: str
    """Its name in `formats.FORMATS`."""
    ignored: tuple[str, ...]
    notes: tuple[Finding, ...]
    """Warnings and infos: they do not leave it out."""


class _Illegal(Exception):
    """Not JSON: code, message, characters before the place, and what to do."""

    def __init__(self, code: str, message: str, position: int, help: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.position = code, message, position
        self.help = help or CODES[code].remedy


class Judge:
    """Judges the records of one unit."""

    def __init__(self, shown: str, reading: Reading = AS_FOUND, severities: Severities = AS_CODED) -> None:
        """shown: what findings call the file."""
        self.shown, self.reading, self.severities = shown, reading, severities

    def __call__(self, raw: RawRecord) -> Judged | Finding:
        if raw.problem is not None:
            code, message = raw.problem
            return record_finding(raw, self.shown, code, "$", message)
        exact = True
        try:
            value = raw.data if isinstance(raw.data, dict) else _decode(raw.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            exact = False
            try:
                value = _by_the_standard(raw)
            except _Illegal as error:
                return _illegal(raw, self.shown, error)
        try:
            reconciled = reconcile(value, self.reading)
            if not exact or isinstance(raw.data, dict):
                _refuse_unwritable(reconciled.conversation)
        except RecordError as error:
            return record_finding(raw, self.shown, error.code, error.path, error.message, error.help)
        except RecursionError:
            return record_finding(raw, self.shown, "too_deep", "$", "nested too deep")
        return self._by_the_rules(reconciled, raw)

    def _by_the_rules(self, reconciled: Reconciled, raw: RawRecord) -> Judged | Finding:
        """Good, with what is odd about it; or the first oddity that the recipe calls an error."""
        notes = []
        for odd in find_oddities(reconciled.conversation, raw.data if isinstance(raw.data, bytes) else None):
            severity = self.severities.of(odd.code)
            if severity != "ignore":
                path = reconciled.place(odd.message_index, odd.part)
                notes.append(record_finding(raw, self.shown, odd.code, path, odd.found, odd.help, severity=severity))
        if bad := next((note for note in notes if note.severity == "error"), None):
            return bad
        return Judged(
            conversation=reconciled.conversation,
            format=reconciled.format,
            ignored=reconciled.ignored,
            notes=tuple(notes),
        )


def _by_the_standard(raw: RawRecord) -> Any:
    """What the standard library makes of a text that msgspec refuses: legal JSON is a value, all else _Illegal."""
    assert isinstance(raw.data, bytes)
    try:
        text = raw.data.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"byte 0x{raw.data[error.start]:02x} at byte {error.start + 1} of the record is not UTF-8"
        before = len(raw.data[: error.start].decode("utf-8"))
        raise _Illegal("invalid_utf8", message, before) from None

    def refuse_constant(name: str) -> None:
        raise _Illegal("nan", f"found {name}, which is not JSON", max(0, text.find(name)))

    try:
        return json.loads(text, parse_constant=refuse_constant, parse_int=_to_int)
    except json.JSONDecodeError as error:
        if raw.cut and (error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")):
            raise _Illegal("cut_line", f"the file ends inside this record ({error.msg})", error.pos) from None
        raise _Illegal("invalid_json", f"not JSON: {error.msg}", error.pos, _json_help(text, error)) from None
    except RecursionError:
        raise _Illegal("too_deep", "nested too deep", 0) from None


def _to_int(digits: str) -> int | float:
    """An integer of any length: legal JSON, though Python refuses to convert more than some thousand digits."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _json_help(text: str, error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return "write one record a line"
    if text[: error.pos].rstrip().endswith(","):
        return "remove the comma before the closing bracket"
    return CODES["invalid_json"].remedy


def _illegal(raw: RawRecord, shown: str, error: _Illegal) -> Finding:
    assert isinstance(raw.data, bytes)
    before = raw.data.decode("utf-8", "replace")[: error.position]
    line = raw.line + before.count("\n")
    column = len(before) - (before.rfind("\n") + 1) + 1
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
        found = f"half a surrogate pair, {error.object[error.start]!a}, which is no character"
        raise RecordError("lone_surrogate", path, found, "repair the escape") from None


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
        column=1,
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
