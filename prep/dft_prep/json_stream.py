"""Cut a stream of bytes into the elements of a JSON array, or into objects that follow one another.

Called by `readers`. Only the borders are found here: a compiled regex passes over text and strings, brackets are
counted, and each element's bytes are handed on unread. The window holds at least the current element and doubles
when that is not enough: memory follows the largest element, and time stays linear.

An element that is broken inside keeps its damage to itself where its brackets still balance. Where they cannot (a
string that runs into a newline, a closing bracket that nothing opened), the next line that begins as the broken
element's first line did is taken for the next element.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

_STRING = rb'"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
# Complete strings, and all that is neither a string nor a border. They match always, so nothing is tried twice.
_INSIDE = re.compile(rb'[^"{}\[\]]*(?:' + _STRING + rb'[^"{}\[\]]*)*', re.DOTALL)
_TOP = re.compile(rb'[^"{}\[\],]*(?:' + _STRING + rb'[^"{}\[\],]*)*', re.DOTALL)
_OPEN_STRING = re.compile(rb'"[^"\\\n]*(?:\\.[^"\\\n]*)*\\?', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*")
_WHITE = b" \t\r\n"
_parse = msgspec.json.Decoder(msgspec.Raw).decode
_MISSES_ALLOWED = 8  # then the separator is one that stands inside elements too, and guessing costs more than it gives
_QUOTE = ord('"')
_CHUNK = 1 << 18
_LINE_LOOKBACK = 256
_KEPT_OF_DAMAGE = 1 << 24
"""Bytes kept of a stretch that could not be cut into elements: it may be the rest of the file."""


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One value of the stream, or a place where something is wrong with the stream itself."""

    offset: int
    """Of its first byte, from the start of the stream."""
    line: int
    """1-based."""
    column: int
    """1-based, in characters."""
    data: bytes
    cut: bool = False
    """The stream ended inside it."""
    problem: str | None = None
    """What is wrong here, where `data` is no value at all."""


def split_values(chunks: Iterable[bytes], kind: Literal["array", "object"]) -> Iterator[Piece]:
    """The values of a whole stream: the elements of one array, or objects that follow one another."""
    splitter = _Splitter(chunks)
    return splitter.elements() if kind == "array" else splitter.objects()


class _Splitter:
    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._array = False
        self._data = b""
        self._base = 0  # offset of _data in the stream
        self._start = 0  # of the current value; positions are within _data
        self._at = 0
        self._line, self._column, self._counted = 1, 1, 0  # of the byte at _counted
        self._damage_seen = False
        self._misses = 0  # wrong guesses at an element's end
        self._closed = False  # the array's end was found in a damaged stretch

    def elements(self) -> Iterator[Piece]:
        self._array = True
        if self._next_byte() == b"[":
            self._at += 1
        after_comma = False
        while byte := self._next_byte():
            if byte in (b",", b"]"):
                if after_comma or byte == b",":
                    yield self._problem("a comma in the array with no element beside it")
                after_comma = False
                self._at += 1
                if byte == b"]" and (not self._next_byte() or not self._damage_seen):
                    yield from self._trailing()
                    return
                continue
            yield (element := self._element())
            after_comma = self._next_byte() == b","
            self._at += after_comma
            if element.cut or self._closed:
                return
        yield self._problem("the array is not closed: the file ends before its ']'", cut=True)

    def objects(self) -> Iterator[Piece]:
        while byte := self._next_byte():
            yield self._element() if byte == b"{" else self._rest_of_line()

    def _trailing(self) -> Iterator[Piece]:
        if self._next_byte():
            yield self._problem("text after the array's end", shown=1000)

    def _rest_of_line(self) -> Piece:
        """What is no object, up to its line's end: one bad record."""
        end = self._data.find(b"\n", self._at)
        while end < 0 and self._grow():
            end = self._data.find(b"\n", self._at)
        self._at = len(self._data) if end < 0 else end
        return self._made()

    # -- one element ---------------------------------------------------------------------------------------------

    def _element(self) -> Piece:
        """The element that begins here; `_at` is then behind it."""
        if self._misses < _MISSES_ALLOWED and (guessed := self._guessed()) is not None:
            return guessed
        stack = bytearray()
        while True:
            data = self._data
            at = self._at = (_INSIDE if stack else _TOP).match(data, self._at).end()  # type: ignore[union-attr]
            if at == len(data) or (byte := data[at]) == _QUOTE:
                if at < len(data) and _OPEN_STRING.match(data, at).end() < len(data):  # type: ignore[union-attr]
                    return self._damaged()
                if not self._grow():
                    unfinished = bool(stack) or self._at < len(self._data)
                    self._at = len(self._data)
                    return self._made(cut=unfinished)
                continue
            if not stack and self._array and byte in b",]":
                return self._made()
            self._at = at + 1
            if byte in b"{[":
                stack.append(byte)
            elif stack:
                # "{" and "}" are two apart, and so are "[" and "]". One that was left open is closed with its parent.
                opened = stack.rfind(byte - 2)
                if opened < 0:
                    return self._damaged()
                del stack[opened:]
                if not stack and not self._array:
                    return self._made()

    def _guessed(self) -> Piece | None:
        """The element, if it ends where what separates it from the one before it comes again: several times as fast.

        A wrong guess is never taken: an object that parses as a whole ends nowhere else.
        """
        data, start = self._data, self._start
        before = data.rfind(b"}", max(0, start - _LINE_LOOKBACK), start)
        separator = data[before + 1 : start] if before >= 0 else b""
        if separator.strip(_WHITE) != b",":
            return None
        end = data.find(b"}" + separator + b"{", start) + 1
        if not end:
            return None
        try:
            _parse(data[start:end])
        except (msgspec.DecodeError, RecursionError):
            self._misses += 1
            return None
        self._at = end
        return self._made()

    def _damaged(self) -> Piece:
        """Pass over an element whose brackets cannot be trusted, to the next line that begins as it does."""
        self._damage_seen = True
        first = self._made()
        next_start, kept = self._next_start(), bytearray()
        while (found := next_start.search(self._data, self._at)) is None:
            passed = max(self._at, self._data.rfind(b"\n"))
            kept += self._data[self._start : min(passed, self._start + _KEPT_OF_DAMAGE - len(kept))]
            self._start = self._at = passed
            if not self._grow():
                return self._damaged_to_the_end(first, kept + self._data[self._start :])
        kept += self._data[self._start : found.start()]
        self._at = found.end()
        return msgspec.structs.replace(first, data=bytes(kept.rstrip(_WHITE + b",")))

    def _damaged_to_the_end(self, first: Piece, kept: bytearray) -> Piece:
        data = bytes(kept.rstrip(_WHITE))
        self._at = len(self._data)
        if self._array and data.endswith(b"]"):
            self._closed = True
            data = data[:-1].rstrip(_WHITE)
        return msgspec.structs.replace(first, data=data, cut=not self._closed)

    def _next_start(self) -> re.Pattern[bytes]:
        line_start = self._line_start()
        indent = self._data[line_start : self._start] if line_start is not None else None
        if indent is None or indent.strip(b" \t"):
            return re.compile(rb"\n[ \t]*(?=\{)")
        return re.compile(rb"\n" + re.escape(indent) + rb"(?=\{)")

    # -- the window ----------------------------------------------------------------------------------------------

    def _next_byte(self) -> bytes:
        """The next byte that is not white space (`_at` is then there), or b"" at the stream's end."""
        while True:
            self._at = self._start = _SPACE.match(self._data, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._data):
                return self._data[self._at : self._at + 1]
            if not self._grow():
                return b""

    def _grow(self) -> bool:
        """Drop what was passed and read at least as much again as there is; False at the stream's end."""
        drop = self._line_start()
        drop = self._start if drop is None else drop
        self._count_lines(drop)
        kept = self._data[drop:]
        pieces, got = [kept], 0
        while got < max(_CHUNK, len(kept)) and (chunk := next(self._chunks, None)) is not None:
            pieces.append(chunk)
            got += len(chunk)
        self._data = b"".join(pieces)
        self._base += drop
        self._start, self._at, self._counted = self._start - drop, self._at - drop, self._counted - drop
        return got > 0

    def _line_start(self) -> int | None:
        """Where the line of the current element begins, if that is near and in the window."""
        lowest = max(0, self._start - _LINE_LOOKBACK)
        newline = self._data.rfind(b"\n", lowest, self._start)
        if newline < 0 and (lowest > 0 or self._base > 0):
            return None
        return newline + 1

    def _count_lines(self, position: int) -> None:
        if position <= self._counted:
            return
        newlines = self._data.count(b"\n", self._counted, position)
        line_start = self._counted
        if newlines:
            self._line += newlines
            self._column = 1
            line_start = self._data.rfind(b"\n", self._counted, position) + 1
        self._column += len(self._data[line_start:position].decode("utf-8", "replace"))
        self._counted = position

    def _made(self, *, cut: bool = False) -> Piece:
        """The value from its start up to `_at`."""
        self._count_lines(self._start)
        data = self._data[self._start : self._at].rstrip(_WHITE)
        return Piece(offset=self._base + self._start, line=self._line, column=self._column, data=data, cut=cut)

    def _problem(self, message: str, *, shown: int = 1, cut: bool = False) -> Piece:
        data = self._data[self._at : self._at + shown]
        self._count_lines(self._at)
        place = {"offset": self._base + self._at, "line": self._line, "column": self._column}
        return Piece(**place, data=data, cut=cut, problem=message)
