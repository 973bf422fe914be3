"""What a text that the quick decoder refuses really is: legal JSON after all, or not, and then why and where.

Called by `validate.Judge`. RFC 8259 decides, as the standard library reads it; the codes tell the common mistakes
apart, each with its own remedy.
"""

from __future__ import annotations

import json
import re
from typing import Any

from dft_prep.codes.table import CODES

_COMMENT = re.compile(r"//|/\*|#")
_CLOSING = re.compile(r"[ \t\r\n]*[\]}]")
_FRAGMENT = re.compile(r'[ \t]*(?:"(?:[^"\\]|\\.)*"[ \t]*:|[\]}]+[ \t]*,?[ \t\r]*$)')
"""A line out of the middle of an indented record: `"a": 1,` or `},`."""


_UNFINISHED = re.compile(r"[ \t\r\n]*(?:t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?|-|\.|[eE][+-]?|u?[0-9a-fA-F]{0,4})")
"""What parsers stop at where a text ends early: nothing, or the beginning of a literal, of a number's part, of \\u."""


_DEEPEST = 500
"""Levels. Decoders stop somewhere between 800 and 1,000, by how deep their caller stands; this limit stays the same."""
_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|([\[{])|[\]}]', re.DOTALL)


def is_too_deep(data: bytes) -> bool:
    """Whether a text opens more brackets inside one another than are read."""
    if data.count(b"[") + data.count(b"{") <= _DEEPEST:
        return False
    depth = 0
    for found in _BRACKET.finditer(data):
        if found[1]:
            depth += 1
            if depth > _DEEPEST:
                return True
        elif found[0] in (b"]", b"}"):
            depth -= 1
    return False


class Illegal(Exception):
    """Not JSON: code, message, characters before the place, and what to do."""

    def __init__(self, code: str, message: str, position: int, help: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.position = code, message, position
        self.help = help or CODES[code].remedy


def by_the_standard(data: bytes, *, cut: bool, is_line: bool) -> Any:
    """The value of a text that is legal JSON. Raises Illegal for all else.

    cut: the file ends inside it. is_line: it is one of many lines, each of which should be a record.
    """
    text = _decoded(data, cut=cut)

    def refuse_constant(name: str) -> None:
        raise Illegal("nan", f"found {name}, which is not JSON", _position_of(name, text))

    try:
        return json.loads(text, parse_constant=refuse_constant, parse_int=_to_int)
    except json.JSONDecodeError as error:
        raise _explained(text, error, cut=cut, is_line=is_line) from None
    except RecursionError:
        raise Illegal("too_deep", "nested too deep", 0) from None


def _decoded(data: bytes, *, cut: bool) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = len(data[: error.start].decode("utf-8"))
        if cut and error.reason == "unexpected end of data":
            raise Illegal("cut_line", "the file ends inside this record (in a character)", position) from None
        message = f"byte 0x{data[error.start]:02x} at byte {error.start + 1} of the record is not UTF-8"
        raise Illegal("invalid_utf8", message, position) from None


def _to_int(digits: str) -> int | float:
    """An integer of any length: legal JSON, though Python refuses to convert more than some thousand digits."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _position_of(name: str, text: str) -> int:
    """Where a constant stands outside of every text."""
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|' + re.escape(name), text):
        if found[0] == name:
            return found.start()
    return 0


def _explained(text: str, error: json.JSONDecodeError, *, cut: bool, is_line: bool) -> Illegal:
    at = error.pos
    rest = text[at:]
    if "\0" in text:
        count = text.count("\0")
        return Illegal("nul_bytes", f"{count:,} NUL bytes", text.index("\0"))
    unfinished = error.msg.startswith("Unterminated string") or _UNFINISHED.fullmatch(rest)
    if cut and unfinished and error.msg != "Extra data":
        return Illegal("cut_line", f"the file ends inside this record ({error.msg})", at)
    if (comment := _comment_at(text, at)) is not None:
        return Illegal("json_comment", "a comment, which JSON does not have", comment)
    if (comma := _trailing_comma_at(text, at)) is not None:
        return Illegal("trailing_comma", "a comma with nothing behind it", comma)
    opens = text.lstrip()[:1] in ("{", "[") and text.rstrip()[-1:] in ("{", "[", ",")
    if is_line and (_FRAGMENT.match(text) or (opens and not rest.strip())):
        return Illegal("record_over_lines", "a piece of a record that is spread over several lines", at)
    if error.msg == "Extra data" and rest.lstrip()[:1] in ("{", "["):
        return Illegal("two_records_on_a_line", "another record begins on the same line", at)
    return Illegal("invalid_json", f"not JSON: {error.msg}", at, _help(error))


def _comment_at(text: str, at: int) -> int | None:
    """Where a comment begins, if that is what the parser stopped at."""
    start = len(text) - len(text[at:].lstrip())
    return start if _COMMENT.match(text, start) else None


def _trailing_comma_at(text: str, at: int) -> int | None:
    """Where the comma before a closing bracket is. Parsers stop at it, or behind it."""
    comma = at if text[at : at + 1] == "," else len(text[:at].rstrip()) - 1
    return comma if comma >= 0 and text[comma] == "," and _CLOSING.match(text, comma + 1) else None


def _help(error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return "write one record a line"
    if error.msg.startswith("Expecting property name enclosed in double quotes"):
        return "write keys in double quotes"
    if error.msg.startswith("Invalid control character"):
        return "write line breaks and tabs inside a text as \\n and \\t"
    if error.msg.startswith("Invalid \\escape"):
        return "write a backslash as two"
    return CODES["invalid_json"].remedy
