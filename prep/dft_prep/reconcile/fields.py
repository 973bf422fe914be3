"""Which fields the records of a source have, with which types and how often: the reconciliation report.

Counted by `judge.judgement` while it judges; added up by `validate.command` (for its summary) and `outcome` (for the
manifest and report.json). Nothing is inferred from the counts: every record is read by its own keys.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from dft_prep.reconcile.formats import FORMATS, KNOWN_FIELDS, SHARED_FIELDS
from dft_prep.reconcile.reading import AS_FOUND, Reading, steps_of, written_path

MOST_PATHS = 300
"""Data may have keys without end (an id as a key). What comes after so many different ones is counted as one."""
_MOST_SIGNATURES = 2000
_LONGEST_NAME = 60
OTHERS = "(other fields)"
_NAMES: dict[type, str] = {
    str: "text",
    int: "number",
    float: "number",
    bool: "boolean",
    list: "list",
    dict: "object",
    type(None): "null",
}

Signature = tuple[str, tuple[tuple[str, type], ...]]
"""(format, ((path, type), ...)): what a record looks like from outside."""


class FieldUse(msgspec.Struct, frozen=True, kw_only=True):
    """One field of a source, with one type."""

    format: str
    path: str
    """`messages[].content`, `meta`."""
    type: str
    """JSON's name of it."""
    records: int
    """How many records have it."""
    target: str | None
    """What it became in the canonical conversation; None: it is not used."""


class FieldCounts:
    """Counts the fields of good records."""

    def __init__(self) -> None:
        self._signatures: dict[Signature, int] = {}
        self._counts: dict[tuple[str, str, str], int] = {}
        self._paths: set[str] = set()

    def add(self, signature: Signature, times: int = 1) -> bool:
        """Count a record; whether it is the first that looks so."""
        known = self._signatures.get(signature, 0)
        self._signatures[signature] = known + times
        if not known and len(self._signatures) > _MOST_SIGNATURES:
            self._fold()
        return not known

    def _fold(self) -> None:
        for (form, fields), number in self._signatures.items():
            self._count("", "", form, number)
            for path, kind in fields:
                self._count(path, _NAMES.get(kind, kind.__name__), form, number)
        self._signatures.clear()

    def _count(self, path: str, kind: str, form: str, number: int) -> None:
        if path not in self._paths and len(self._paths) >= MOST_PATHS:
            path, kind = OTHERS, ""
        self._paths.add(path)
        key = (form, path, kind)
        self._counts[key] = self._counts.get(key, 0) + number

    def counts(self) -> list[tuple[str, str, str, int]]:
        """(format, path, type, records); a format's own records are at the path ""."""
        self._fold()
        return [(*key, number) for key, number in self._counts.items()]


@functools.cache
def _lists_of_messages(form: str) -> tuple[str, ...]:
    """The fields of a format that hold messages, whose own fields are counted too."""
    return tuple(dict.fromkeys(path.split("[]")[0] for path in FORMATS[form].fields if "[]." in path))


@functools.cache
def _used_fields(form: str) -> dict[str, str]:
    """What each path became; what holds a used field is used too."""
    used = {**SHARED_FIELDS, **FORMATS[form].fields}
    return {**{path.split("[]")[0]: target.split("[]")[0] for path, target in used.items()}, **used}


def target_of(form: str, path: str) -> str | None:
    """What a field of a format became in the canonical conversation; None: it is not used."""
    return _used_fields(form).get(path)


def may_read(reading: Reading, field: str) -> bool:
    """Whether a conversation may be read from a top-level field."""
    return field in KNOWN_FIELDS or any(steps_of(path)[0] == field for _, path in reading.fields)


def fields_of(record: Mapping[str, Any], form: str) -> tuple[tuple[str, type], ...]:
    """The fields of a record and their types, those of its messages as `messages[].name`, each once."""
    fields = [(key, type(value)) for key, value in record.items()]
    for key in _lists_of_messages(form):
        messages = record.get(key)
        if isinstance(messages, list):
            found: dict[tuple[str, type], None] = {}
            for message in messages:
                if isinstance(message, dict):
                    for name, value in message.items():
                        found[name, type(value)] = None
            fields += [(f"{key}[].{name}", kind) for name, kind in found]
    return tuple(fields)


def short_name(path: str) -> str:
    """A field's name or path for a report: short, and of whole characters (JSON allows half of one)."""
    if path.isascii() and len(path) <= _LONGEST_NAME:
        return path
    return path[:_LONGEST_NAME].encode("utf-8", "backslashreplace").decode()


def field_uses(counts: Iterable[Sequence[tuple[str, str, str, int]]], reading: Reading = AS_FOUND) -> list[FieldUse]:
    """Several `FieldCounts.counts()` added up, the most frequent field first; a format's own records at the path ""."""
    total: Counter[tuple[str, str, str]] = Counter()
    for part in counts:
        for form, path, kind, number in part:
            total[form, path, kind] += number
    ordered = sorted(total.items(), key=lambda item: (item[0][0], -item[1], item[0]))
    return [
        FieldUse(
            format=form,
            path=short_name(written_path(f"$.{path}", reading).removeprefix("$.")) if path else "",
            type=kind,
            records=number,
            target=target_of(form, path) if path else "messages",
        )
        for (form, path, kind), number in ordered
    ]
