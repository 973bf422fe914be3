"""How a source's records are to be read, where its recipe says: the format, the fields, the roles.

Parsed by `sources` from a mapping in `data_files`; used by `reconcile`. Part of the recipe, for it decides what a
conversation is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from dft_common.errors import SetupError
from dft_common.records import ROLES
from dft_prep.reconcile.converters import RecordError
from dft_prep.reconcile.formats import FORMATS, KNOWN_FIELDS, SHARED_FIELDS
from dft_prep.reconcile.formats.places import ALIKE

READING_KEYS = ("format", "fields", "roles")
_NOTHING = object()
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]|\['([^']+)'\]")
_PATH = re.compile(r"\$?(?:\.?[^.\[\]]+|\[\d+\]|\['[^']+'\])(?:\.[^.\[\]]+|\[\d+\]|\['[^']+'\])*")
_WHERE_THERE = "?"
"""At the end of a path: a record, or a message, may lack it."""
_WRITTEN = re.compile(r"\$\.([^.\[\]]+)((?:\[\d*\])*)(?:\.([^.\[\]]+))?(.*)", re.DOTALL)
"""A path in a mapped record: (field, its index, field of the message, the rest)."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing set: each record's own keys tell its format."""

    format: str | None = None
    """A name of `formats.FORMATS`: every record is read as this."""
    fields: tuple[tuple[str, str], ...] = ()
    """(the format's field, the JSON path that holds it), in order. `messages[].role`: a path within each message.
    A path that ends in `?` may lead to nothing."""
    roles: tuple[tuple[str, str], ...] = ()
    """(a role of the data, the canonical role)."""


AS_FOUND = Reading()


def parse_reading(mapping: Mapping[str, Any]) -> Reading:
    """The keys `format`, `fields` and `roles` of a source's mapping. Raises SetupError."""
    form = mapping.get("format")
    if form is not None and form not in FORMATS:
        close = difflib.get_close_matches(str(form), FORMATS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the formats are {', '.join(FORMATS)}"
        raise SetupError(f"data_files: format {form!r} is not known", remedy=hint)
    fields, roles = (_texts(mapping, key) for key in ("fields", "roles"))
    known = _fields_of(form)
    for field, path in fields:
        if field not in known:
            close = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"they are {', '.join(known)}"
            raise SetupError(f"data_files: fields: {form or 'no format'} has no field {field!r}", remedy=hint)
        if not _PATH.fullmatch(path):
            raise SetupError(f"data_files: fields: {path!r} is no JSON path", remedy="write it as $.data.turns[0].text")
    for name, role in roles:
        if role not in ROLES:
            raise SetupError(f"data_files: roles: {name}: {role!r}", remedy=f"the roles are {', '.join(ROLES)}")
    return Reading(format=form, fields=fields, roles=roles)


def _texts(mapping: Mapping[str, Any], key: str) -> tuple[tuple[str, str], ...]:
    value = mapping.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise SetupError(
            f"data_files: {key}: found {value!r}, expected a mapping of texts", remedy=f"write `{key}: {{a: b}}`"
        )
    return tuple(value.items())


def _fields_of(form: str | None) -> list[str]:
    """The fields that may be mapped: those of the format, or of any."""
    forms = [FORMATS[form]] if form is not None else list(FORMATS.values())
    paths = [path for each in forms for path in each.fields]
    return list(dict.fromkeys([*(path.split("[")[0] for path in paths), *paths, *SHARED_FIELDS]))


def steps_of(path: str) -> list[str | int]:
    """`$.data.turns[0]['a.b']` -> ["data", "turns", 0, "a.b"]."""
    return [int(index) if index else name or key for name, index, key in _STEP.findall(_named(path).removeprefix("$"))]


def _named(path: str) -> str:
    """The path alone, without the mark that it may lead to nothing."""
    return path.removesuffix(_WHERE_THERE)


def top_field(field: str) -> str:
    """`messages[].role` -> `messages`."""
    return field.split("[", 1)[0]


def _step(value: Any, step: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(step, _NOTHING)
    return value[step] if isinstance(value, list) and isinstance(step, int) and step < len(value) else _NOTHING


def _found(value: Any, path: str, within: str) -> Any:
    """What is at `path` in `value`, which is at `within` in the record; _NOTHING where the path allows that."""
    for step in steps_of(path):
        value = _step(value, step)
        if value is _NOTHING:
            if path.endswith(_WHERE_THERE):
                return _NOTHING
            message = "there is nothing here, and the recipe names it"
            help = "correct `fields` in the recipe, or the record; a path that ends in `?` may lead to nothing"
            raise RecordError("missing_field", _joined(within, path), message, help)
    return value


def _joined(base: str, path: str) -> str:
    inner = _named(path).removeprefix("$").removeprefix(".")
    return f"{base}{inner}" if inner.startswith("[") else f"{base}.{inner}"


def mapped_record(record: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """The record as its format has it. Raises RecordError where a path leads to nothing."""
    top = {field: path for field, path in reading.fields if "[]" not in field}
    inner: dict[str, dict[str, str]] = {}
    for field, path in reading.fields:
        if "[]." in field:
            key, name = field.split("[].", 1)
            inner.setdefault(key, {})[name] = path
    # What a field is taken from is no second reading; but a system turn or tools may stand within the conversation.
    sources = {
        steps_of(path)[0]
        for field, path in top.items()
        if field not in SHARED_FIELDS or len(steps_of(path)) == 1 or steps_of(path)[0] not in KNOWN_FIELDS
    }
    mapped = {key: value for key, value in record.items() if key not in sources}
    mapped.update(_found_fields(record, top, "$"))
    for key, names in inner.items():
        messages = mapped.get(key)
        if isinstance(messages, list):
            within = written_path(f"$.{key}", reading)
            mapped[key] = [
                _mapped_message(message, names, f"{within}[{number}]") for number, message in enumerate(messages)
            ]
    return mapped


def _mapped_message(message: Any, names: Mapping[str, str], within: str) -> Any:
    if not isinstance(message, dict):
        return message
    found = _found_fields(message, names, within)
    used = {steps_of(path)[0] for path in names.values()}
    # What the recipe maps comes before what else might be meant.
    used.update(key for alike in ALIKE if not found.keys().isdisjoint(alike) for key in alike)
    rest = {key: value for key, value in message.items() if key not in used}
    return {**rest, **found}


def _found_fields(value: Any, paths: Mapping[str, str], within: str) -> dict[str, Any]:
    """What is at each path, by its field."""
    found = ((field, _found(value, path, within)) for field, path in paths.items())
    return {field: each for field, each in found if each is not _NOTHING}


def written_path(path: str, reading: Reading) -> str:
    """A JSON path of a mapped record (`$.messages[2].role`, or `[]` for any), as it is in the record as written."""
    if not reading.fields:
        return path
    matched = _WRITTEN.fullmatch(path)
    if matched is None:
        return path
    key, index, inner, rest = matched.groups()
    paths = dict(reading.fields)
    base = _joined("$", paths.get(key, key)) + index
    if inner is None:
        return base + rest
    return _joined(base, paths.get(f"{key}[].{inner}", inner)) + rest
