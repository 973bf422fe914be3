"""Segments as a person reads them: what is trained, what is context, which are control tokens.

Called by `preview` and `inspection`. On a terminal trained text is green, context dim and control tokens bold;
elsewhere trained text stands in ⟦ ⟧ and control tokens in ‹ ›. Text from data is escaped: no control sequence
in it reaches the terminal, and no mark in it can be taken for one of ours.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from dft_common.errors import printable, printable_json
from dft_common.manifest import encode_json
from dft_prep.show.segments import Segment, Token

NEWLINE = "↵"
"""Stands before each line break of the data."""
WEIGHT = "▸"
"""Stands behind a weight that is neither 0 nor 1, at the beginning of what is trained with it."""
BORDER = "│"
TRAINED = ("⟦", "⟧")
CONTROL = ("‹", "›")

_SAMPLE = (
    Segment(trained=True, text="trained"),
    Segment(trained=False, text=" context "),
    Segment(trained=False, text="control token", control=True),
    Segment(trained=False, text=" "),
    Segment(trained=True, text="trained with weight 0.5", weight=0.5),
)


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to show: a row, a conversation, or why a record would be left out."""

    title: str
    about: dict[str, Any]
    """What `--format json` says of it."""
    segments: list[Segment] = []
    tokens: list[Token] | None = None
    """Where token borders were asked for."""
    edges: list[int] = []
    """With `tokens`: where in them each segment begins, and their end."""

    def as_object(self) -> dict[str, Any]:
        value = {**self.about, "segments": msgspec.to_builtins(self.segments)}
        return value if self.tokens is None else {**value, "token_list": msgspec.to_builtins(self.tokens)}

    def pieces(self) -> list[list[str]]:
        """The texts of each segment: one, or where borders were asked for one for each of its tokens."""
        if self.tokens is None:
            return [[segment.text] for segment in self.segments]
        return [[token.text for token in self.tokens[a:b]] for a, b in itertools.pairwise(self.edges)]


class Style(NamedTuple):
    """How text is told apart here."""

    coloured: bool
    borders: bool

    def visible(self, text: str, segment: Segment) -> str:
        """`text` with newlines to be seen, and nothing in it that a terminal obeys or a reader takes for a mark."""
        marks = NEWLINE + WEIGHT + BORDER * self.borders + ("" if self.coloured else "".join(TRAINED + CONTROL))
        escaped = re.sub(f"[{marks}]", lambda match: f"\\u{ord(match[0]):04x}", printable(text))
        shown = escaped.replace("\n", f"{NEWLINE}\n")
        return f"{CONTROL[0]}{shown}{CONTROL[1]}" if segment.control and not self.coloured else shown

    def of_text(self, segment: Segment) -> str:
        if not self.coloured:
            return ""
        plain = "green" if segment.trained else "dim"
        bold = "bold green" if segment.trained else "bold magenta"
        return (bold if segment.control else plain) + (" underline" if segment.weight is not None else "")

    def of_marks(self) -> str:
        return "bold" if self.coloured else ""


class Line:
    """Runs of (text, colour). A line break at a run's end waits for the marks that close what stands before it."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, str]] = []
        self._breaks = False

    def add(self, text: str, colour: str = "") -> None:
        self.end()
        self._breaks = text.endswith("\n")
        self.runs.append((text.removesuffix("\n"), colour))

    def close(self, mark: str, colour: str = "") -> None:
        self.runs.append((mark, colour))

    def end(self) -> None:
        if self._breaks:
            self.runs.append(("\n", ""))
        self._breaks = False


def lay_out(segments: Sequence[Segment], pieces: Sequence[Sequence[str]], style: Style) -> Line:
    """Every piece of every segment, with the marks and colours of `style`."""
    line = Line()
    pairs = zip(segments, pieces, strict=True)
    for (trained, weight), run in itertools.groupby(pairs, key=lambda pair: (pair[0].trained, pair[0].weight)):
        marked = trained and not style.coloured
        opening = TRAINED[0] * marked + (f"{weight:g}{WEIGHT}" if weight is not None else "")
        for segment, text in ((segment, text) for segment, texts in run for text in texts):
            if style.borders and line.runs:
                line.close(BORDER, "blue" if style.coloured else "")
            if opening:
                line.add(opening, style.of_marks())
                opening = ""
            line.add(style.visible(text, segment), style.of_text(segment))
        if marked:
            line.close(TRAINED[1])
    return line


def _legend(style: Style) -> Line:
    line = lay_out(_SAMPLE, [[segment.text] for segment in _SAMPLE], style._replace(borders=False))
    line.add(f" {NEWLINE} newline" + (f" {BORDER} token border <0xE6> a byte of a character" if style.borders else ""))
    return line


def _lines(items: Sequence[Shown], style: Style) -> Iterator[Line]:
    yield _legend(style)
    for item in items:
        title = Line()
        title.add(printable(item.title), style.of_marks())
        yield title
        if item.segments:
            yield lay_out(item.segments, item.pieces(), style)


def print_text(items: Sequence[Shown], *, borders: bool) -> None:
    """Print to stdout, the legend first, in colours where it is a terminal that has them."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    for line in _lines(items, Style(coloured, borders)):
        if coloured:
            console.print(Text.assemble(*line.runs))
        else:
            sys.stdout.write("".join(text for text, _ in line.runs) + "\n")


def print_json(value: Any) -> None:
    """Print to stdout as UTF-8, whatever the locale, with what a terminal may obey as `\\u009b` and the like."""
    sys.stdout.flush()
    sys.stdout.buffer.write(printable_json(encode_json(value).decode()).encode())
    sys.stdout.buffer.flush()
