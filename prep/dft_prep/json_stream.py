"""Cut a stream of bytes into the JSON values it holds, without parsing them and without holding the stream.

Called by `readers` for JSON arrays (each element a value) and for objects that stand one after another. A value
that is broken inside stays one piece, so that it does not take its neighbours with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import msgspec

_STRUCTURE = re.compile(rb'["{}\[\]]')
_STRUCTURE_OR_COMMA = re.compile(rb'[",{}\[\]]')
_SPACE = b" \t\r\n"


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One value of the stream, or a place where something is wrong with the stream itself."""

    offset: int
    """Of its first byte, from the start of the stream."""
    line: int
    """1-based."""
    data: bytes
    cut: bool = False
    """The stream ended inside it."""
    problem: str | None = None
    """What is wrong here, where `data` is no value at all."""


class Splitter:
    """Feed it chunks; it gives back whole values: the elements of one array, or objects that stand in a row."""

    def __init__(self, kind: Literal["array", "object"]) -> None:
        self._array = kind == "array"
        self._buffer = bytearray()
        self._base = 0  # offset of the buffer's first byte in the stream
        self._line = 1  # line of the buffer's first byte
        self._at = 0  # where scanning goes on
        self._depth = 0
        self._in_string = False
        self._closed = False
        self._trailed = False
        self._elements = 0

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        """The values that end in `chunk`."""
        self._buffer += chunk
        while not self._closed and (found := self._next()) is not None:
            yield from found
        if self._closed:
            yield from self._after_the_end()

    def finish(self) -> Iterator[Piece]:
        """What is left when the stream ends: an unfinished value, or an array without its end."""
        rest = bytes(self._buffer).strip(_SPACE)
        if self._array and not self._closed:
            if rest:
                yield self._piece(len(self._buffer), cut=True)
            else:
                yield self._problem("the array is not closed: its ']' is missing")
        elif not self._array and rest:
            yield self._piece(len(self._buffer), cut=True)

    def _next(self) -> list[Piece] | None:
        """Go on to the next structural byte; None where the buffer has no more."""
        if self._in_string:
            end = self._string_end()
            if end < 0:
                return None
            self._at, self._in_string = end + 1, False
            return []
        separated = self._array and self._depth == 1
        match = (_STRUCTURE_OR_COMMA if separated else _STRUCTURE).search(self._buffer, self._at)
        if match is None:
            self._at = len(self._buffer)
            return None
        position, byte = match.start(), match[0]
        self._at = position + 1
        if byte == b'"':
            self._in_string = True
        elif byte in b"{[":
            return self._opened(position)
        elif byte in b"}]":
            return self._closed_at(position)
        else:
            return self._element(position)
        return []

    def _string_end(self) -> int:
        """Index of the quote that ends the string, or -1: a quote behind an odd number of backslashes is text."""
        position = self._at
        while (position := self._buffer.find(b'"', position)) >= 0:
            before = position
            while before > 0 and self._buffer[before - 1] == 0x5C:
                before -= 1
            if (position - before) % 2 == 0:
                return position
            position += 1
        # The last bytes may be backslashes of an escape that goes on in the next chunk: look at them again then.
        self._at = max(self._at, len(self._buffer))
        return -1

    def _opened(self, position: int) -> list[Piece]:
        self._depth += 1
        if self._array and self._depth == 1:
            self._drop(position + 1)
        elif not self._array and self._depth == 1:
            return self._junk_before(position)
        return []

    def _closed_at(self, position: int) -> list[Piece]:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return []
        if self._array:
            self._closed = True
            rest = bytes(self._buffer[:position]).strip(_SPACE)
            pieces = []
            if rest:
                pieces = [self._piece(position)]
            elif self._elements:
                pieces = [self._problem("a comma before the array's end")]
            self._drop(position + 1)
            return pieces
        piece = self._piece(position + 1)
        self._drop(position + 1)
        return [piece]

    def _element(self, position: int) -> list[Piece]:
        self._elements += 1
        empty = not bytes(self._buffer[:position]).strip(_SPACE)
        piece = self._problem("two commas with nothing between") if empty else self._piece(position)
        self._drop(position + 1)
        return [piece]

    def _junk_before(self, position: int) -> list[Piece]:
        """Text between two values."""
        junk = bytes(self._buffer[:position]).strip(_SPACE + b",")
        pieces = [self._piece(position, problem="text between two JSON values")] if junk else []
        self._drop(position)
        return pieces

    def _after_the_end(self) -> Iterator[Piece]:
        if not self._trailed and self._buffer.strip(_SPACE):
            self._trailed = True
            yield self._problem("text after the array's end")
        self._drop(len(self._buffer))

    def _piece(self, end: int, *, cut: bool = False, problem: str | None = None) -> Piece:
        data = bytes(self._buffer[:end])
        start = len(data) - len(data.lstrip(_SPACE))
        line = self._line + data.count(b"\n", 0, start)
        return Piece(offset=self._base + start, line=line, data=data.strip(_SPACE), cut=cut, problem=problem)

    def _problem(self, text: str) -> Piece:
        return Piece(offset=self._base, line=self._line, data=b"", problem=text)

    def _drop(self, end: int) -> None:
        """Forget the buffer's first `end` bytes."""
        self._line += self._buffer.count(b"\n", 0, end)
        self._base += end
        del self._buffer[:end]
        self._at = max(0, self._at - end)


def split_values(chunks: Iterator[bytes], kind: Literal["array", "object"]) -> Iterator[Piece]:
    """The values of a whole stream."""
    splitter = Splitter(kind)
    for chunk in chunks:
        yield from splitter.feed(chunk)
    yield from splitter.finish()
