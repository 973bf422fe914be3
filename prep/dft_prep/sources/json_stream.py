"""Cut a stream of bytes into the elements of a JSON array, or into objects that follow one another.

Called by `readers`. Only the borders are found here: a compiled regex passes over text and strings, brackets are
counted, and each element's bytes are handed on unread. The window holds at least the current element and doubles
when that is not enough: memory follows the largest element, and time stays linear. Of an element beyond `largest`
only the beginning is kept; the window then passes over the rest of it.

An element that is broken inside keeps its damage to itself where its brackets still balance. Where they cannot (a
string that runs into a newline, a bracket that nothing opened or nothing closes), what begins as the broken element
did, on a line of its own if that did, is taken for the next element.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

_STRING = rb'"[^"\\\n]*(?:\\.[^"\\\n]*){0,1000}"'
# Complete strings, and all that is neither a string nor a border. They match always, so nothing is tried twice. No more
# than a thousand repetitions in one go, for a regex remembers each; `_element` goes on where they end.
_INSIDE = re.compile(rb'[^"{}\[\]]*(?:' + _STRING + rb'[^"{}\[\]]*){0,1000}', re.DOTALL)
_TOP = re.compile(rb'[^"{}\[\],]*(?:' + _STRING + rb'[^"{}\[\],]*){0,1000}', re.DOTALL)
_HEAD = re.compile(rb'\{[ \t\r\n]{0,99}"[^"\\]{0,99}"')
_SPACE = re.compile(rb"[ \t\r\n]*")
_WHITE = b" \t\r\n"
_parse = msgspec.json.Decoder(msgspec.Raw).decode
_MISSES_ALLOWED = 8  # then the separator is one that stands inside elements too, and guessing costs more than it gives
_GUESSED_WITHIN = 1 << 20
_DEEPEST = 10_000_000
"""Levels of brackets that are counted: a byte each."""
_QUOTE, _BACKSLASH, _NEWLINE = b'"\\\n'
_CHUNK = 1 << 18
_LINE_LOOKBACK = 256
"""Bytes. A line that is indented further is not taken for an element's first."""
_LONGEST_START = 2 * _LINE_LOOKBACK
"""Bytes of what stands between two elements, and of the key that the second begins with, at the most."""
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One value of the stream, or a place where something is wrong with the stream itself."""

    offset: int
    """Of its first byte, from the start of the stream."""
    line: int
    """1-based."""
    column: int
    """1-based, in characters."""
    data: bytes
    size: int
    """Bytes that it has in the stream: more than `data`, where it is too large to be held."""
    cut: bool = False
    """The stream ended inside it."""
    problem: str | None = None
    """What is wrong here, where `data` is no value at all."""


def split_values(
    chunks: Iterable[bytes], kind: Literal["array", "object"], *, largest: int, kept: int
) -> Iterator[Piece]:
    """The values of a whole stream: the elements of one array, or objects that follow one another.

    Of a value of more than `largest` bytes only the first `kept` are handed on.
    """
    splitter = _Splitter(chunks, largest, kept)
    return splitter.elements() if kind == "array" else splitter.objects()


def _end_of_text(data: bytes, at: int) -> int:
    """Where a text ends that has begun before `at`: at a quote, at a newline, which it may not hold, or with the data.

    A backslash that is the data's last byte is left, for what it escapes.
    """
    end = at - 1
    while (end := data.find(b'"', end + 1)) >= 0 and _is_escaped(data, at, end):
        pass
    if end < 0:
        end = len(data) - _is_escaped(data, at, len(data))
    newline = at - 1
    while (newline := data.find(b"\n", newline + 1, end)) >= 0 and _is_escaped(data, at, newline):
        pass
    return end if newline < 0 else newline


def _is_escaped(data: bytes, start: int, at: int) -> bool:
    """Whether an odd number of backslashes stands before `at`."""
    before = at
    while before > start and data[before - 1] == _BACKSLASH:
        before -= 1
    return (at - before) % 2 == 1


class _Splitter:
    def __init__(self, chunks: Iterable[bytes], largest: int, kept: int) -> None:
        self._chunks = iter(chunks)
        self._largest, self._kept = largest, kept
        self._large: Piece | None = None  # the beginning of the current value, where `_start` has left it behind
        self._large_end = 0  # offset in the stream: behind the last byte of it that is no white space
        self._array = False
        self._data = b""
        self._base = 0  # offset of _data in the stream
        self._from_line_start = True  # the window begins where a line does
        self._start = 0  # of the current value; positions are within _data
        self._at = 0
        self._line, self._column, self._counted = 1, 1, 0  # of the byte at _counted
        self._damage_seen = False
        self._distrust = False  # an element went on to the stream's end: brackets may take others with them
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
        while (end := self._data.find(b"\n", self._at)) < 0:
            self._at = len(self._data)
            if not self._grow():
                return self._made()
        self._at = end
        return self._made()

    # -- one element ---------------------------------------------------------------------------------------------

    def _element(self) -> Piece:
        """The element that begins here; `_at` is then behind it."""
        if self._misses < _MISSES_ALLOWED and (guessed := self._guessed()) is not None:
            return guessed
        if self._distrust and (damaged := self._up_to_the_next()) is not None:
            return damaged
        stack, in_string = bytearray(), False
        while True:
            data = self._data
            if in_string:
                at = self._at = _end_of_text(data, self._at)
            else:
                at = self._at = (_INSIDE if stack else _TOP).match(data, self._at).end()  # type: ignore[union-attr]
            if at == len(data) or (byte := data[at]) == _BACKSLASH:
                if self._too_large() and (damaged := self._up_to_the_next()) is not None:
                    return damaged
                if self._grow():
                    continue
                unfinished = bool(stack) or in_string
                if unfinished and (damaged := self._up_to_the_next()) is not None:
                    return damaged
                self._at = len(self._data)
                return self._made(cut=unfinished)
            if in_string and byte == _NEWLINE:
                return self._damaged()
            if byte == _QUOTE:
                in_string = not in_string
                self._at = at + 1
                continue
            if not stack and self._array and byte in b",]":
                return self._made()
            self._at = at + 1
            if byte in b"{[":
                if len(stack) >= _DEEPEST:
                    return self._damaged()
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
        """The element, if it ends where what separates it from the one before it comes again, and then the key that
        it begins with: several times as fast. A wrong guess is never taken: an object that parses as a whole ends
        nowhere else.
        """
        data, start = self._data, self._start
        before = data.rfind(b"}", max(0, start - _LINE_LOOKBACK), start)
        separator = data[before + 1 : start] if before >= 0 else b""
        head = _HEAD.match(data, start)
        if before < 0 or separator.strip(_WHITE) != (b"," if self._array else b"") or head is None:
            return None
        end = data.find(b"}" + separator + head[0], start, start + _GUESSED_WITHIN) + 1
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
        if (damaged := self._up_to_the_next(self._at)) is not None:
            return damaged
        next_start = re.compile(self._next_start(rb"\{"))
        while (found := next_start.search(self._data, self._at)) is None:
            self._at = max(self._at, len(self._data) - _LONGEST_START)
            if not self._grow():
                return self._damaged_to_the_end()
        self._at = found.start()
        damaged = self._made(without=_WHITE + b",")
        self._at = found.end()
        return damaged

    def _up_to_the_next(self, before: int | None = None) -> Piece | None:
        """The element as far as the next that begins as it does, key and all, if one does (before `before`)."""
        head = _HEAD.match(self._data, self._start)
        if self._large is not None or head is None:
            return None
        found = re.compile(self._next_start(re.escape(head[0]))).search(self._data, self._start)
        if found is None or (before is not None and found.start() >= before):
            return None
        self._damage_seen = self._distrust = True
        self._at = found.start()
        damaged = self._made(without=_WHITE + b",")
        self._at = found.end()
        return damaged

    def _damaged_to_the_end(self) -> Piece:
        self._at = len(self._data.rstrip(_WHITE))
        self._closed = self._array and self._data[self._start : self._at].endswith(b"]")
        self._at -= self._closed
        damaged = self._made(cut=not self._closed)
        self._at = len(self._data)
        return damaged

    def _next_start(self, begin: bytes) -> bytes:
        """A pattern of what stands between the current element and one that begins with the pattern `begin`."""
        line_start = self._line_start() if self._large is None else None
        indent = self._data[line_start : self._start] if line_start is not None else None
        if indent is not None and not indent.strip(b" \t"):
            return rb"\n%b(?=%b)" % (indent, begin)
        pattern = rb"\n[ \t]{0,%d}(?=%b)" % (_LINE_LOOKBACK, begin)
        if head := _HEAD.match(self._data, self._start):
            pattern += rb"|(?<=\})[ \t]{0,9},[ \t]{0,9}(?=%b)" % re.escape(head[0])
        return pattern

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
        """Drop what was passed and read about as much again as there is; False at the stream's end.

        What is in the window from `_start` on belongs to the current value, and is passed over up to `_at`.
        """
        if self._too_large() or self._large is not None:
            self._let_go()
        drop = self._line_start() if self._large is None else None
        drop = self._start if drop is None else drop
        self._count_lines(drop)
        kept = memoryview(self._data)[drop:]
        pieces: list[bytes | memoryview] = [kept]
        wanted, got = max(_CHUNK, min(len(kept), self._largest - len(kept))), 0
        while got < wanted and (chunk := next(self._chunks, None)) is not None:
            pieces.append(chunk)
            got += len(chunk)
        if drop > 0:
            self._from_line_start = self._data[drop - 1] == _NEWLINE
        self._data = b"".join(pieces)
        self._base += drop
        self._start, self._at, self._counted = self._start - drop, self._at - drop, self._counted - drop
        return got > 0

    def _too_large(self) -> bool:
        """Whether the window holds more of the current value than may be held. White space behind it is not its own,
        but is not held without end either."""
        size = len(self._data) - self._start
        beyond = self._start + self._largest
        return size > 2 * self._largest or (size > self._largest and bool(self._data[beyond:].strip(_WHITE)))

    def _let_go(self) -> None:
        """Keep only the beginning of the current value, which is too large to be held, and leave it behind."""
        if self._large is None:
            self._large = self._piece(self._start, self._data[self._start : self._start + self._kept])
        for start in reversed(range(self._start, self._at, _CHUNK)):
            if passed := self._data[start : min(start + _CHUNK, self._at)].rstrip(_WHITE + b","):
                self._large_end = self._base + start + len(passed)
                break
        self._start = self._at

    def _line_start(self) -> int | None:
        """Where the line of the current element begins, if that is near and in the window."""
        lowest = max(0, self._start - _LINE_LOOKBACK)
        newline = self._data.rfind(b"\n", lowest, self._start)
        if newline < 0 and (lowest > 0 or not self._from_line_start):
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
        for start in range(line_start, position, _CHUNK):
            passed = self._data[start : min(start + _CHUNK, position)]
            self._column += len(passed) if passed.isascii() else len(passed.translate(None, _CONTINUATION_BYTES))
        self._counted = position

    def _made(self, *, cut: bool = False, without: bytes = _WHITE) -> Piece:
        """The value from its start up to `_at`, and `without` what is at its end."""
        data = self._data[self._start : self._at].rstrip(without)
        large, self._large = self._large, None
        if large is None and len(data) > self._largest:
            large = self._piece(self._start, data[: self._kept])
        if large is None:
            return self._piece(self._start, data, cut=cut)
        end = self._base + self._start + len(data) if data else self._large_end
        return msgspec.structs.replace(large, size=end - large.offset, cut=cut)

    def _problem(self, message: str, *, shown: int = 1, cut: bool = False) -> Piece:
        return self._piece(self._at, self._data[self._at : self._at + shown], cut=cut, problem=message)

    def _piece(self, at: int, data: bytes, *, cut: bool = False, problem: str | None = None) -> Piece:
        self._count_lines(at)
        return Piece(
            offset=self._base + at,
            line=self._line,
            column=self._column,
            data=data,
            size=len(data),
            cut=cut,
            problem=problem,
        )
