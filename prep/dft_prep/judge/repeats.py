"""Keys that stand twice in one JSON object: legal, and read differently by every library.

Called by `validate.Judge` and `plain` for every record. A decoded value no longer shows it, so the quotation marks of
the text are counted against those that the value accounts for; only where they differ is the text read again.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import msgspec

_encode = msgspec.json.Encoder().encode


class Repeated(NamedTuple):
    """A key that stands more than once in one object."""

    path: str
    """JSON path of the object's key."""
    field: str
    """The top-level field it is in, or is."""


def quotes_of(value: Any) -> int:
    """How many quotation marks the JSON text of `value` has, if each inside a text is written as one."""
    if isinstance(value, str):
        return 2 + value.count('"')
    if isinstance(value, dict):
        quotes = 2 * len(value)
        for key, item in value.items():
            quotes += key.count('"') + (2 + item.count('"') if type(item) is str else quotes_of(item))
        return quotes
    if isinstance(value, list):
        return sum(map(quotes_of, value))
    return 0


def may_repeat(data: bytes, value: Any) -> bool:
    """Whether the text `data`, of which `value` was read, may hold a key twice."""
    try:
        # Written anew it has as many marks as its value accounts for, several times as fast as going through it.
        quotes = _encode(value).count(b'"')
    except (UnicodeEncodeError, OverflowError):
        quotes = quotes_of(value)
    # A mark written as \u0022 is missing in the text, and could hide one that a repeated key adds.
    return data.count(b'"') != quotes or (b"u0022" in data)


class _Object(dict):
    """A decoded object, with its repeated keys."""

    repeated: tuple[str, ...] = ()


def _made(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        made.repeated = tuple(dict.fromkeys(key for key, _ in pairs if key in seen or seen.add(key)))
    return made


def find_repeated(data: bytes) -> list[Repeated]:
    """Every repeated key of a legal JSON text, in order; none inside a value that a later one replaces."""
    value = json.loads(data, object_pairs_hook=_made, parse_int=float)
    found: list[Repeated] = []
    _walk(value, "$", "", found)
    return found


def _walk(value: Any, path: str, field: str, found: list[Repeated]) -> None:
    if isinstance(value, _Object):
        found += [Repeated(f"{path}.{key}", field or key) for key in value.repeated]
        for key, item in value.items():
            _walk(item, f"{path}.{key}", field or key, found)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _walk(item, f"{path}[{number}]", field, found)
