"""Which message printed which characters of a render, told without changing a character of it.

Called by `template`. A template's syntax tree gets marks around every `for` loop and at the start of each turn
of it. A mark is a string of no characters that remembers a message, so that it travels with what the template
prints and is never part of it: a template that measures, compares, slices or pipes what was marked sees the
text alone, and no text in the data can look like a mark. Where a template captures text (a macro, a `set` or a
filter block), the marks go with the captured string as places in it, through what templates do to such strings
(trim, slice, add). An operation that is not followed loses them: the messages are then missing from the trace,
never misplaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, SupportsIndex

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.visitor import NodeTransformer


class Stretch(NamedTuple):
    """Characters [start, end) of a render that belong to message number `message`."""

    message: int
    start: int
    end: int
    line: int = 0
    """Of the template: the loop that printed it."""


class Traced(NamedTuple):
    """A render, and what the marks said."""

    text: str
    stretches: Sequence[Stretch]
    """In the order of the text; a message that a template passes over without printing has an empty one."""
    generations: Sequence[tuple[int, int]]
    """Characters inside the template's own `{% generation %}` blocks."""

    def place_of(self, message: int) -> Stretch | None:
        """From the first to the last character that `message` prints; None where it prints nothing."""
        mine = [s for s in self.stretches if s.message == message and s.end > s.start]
        return mine[0]._replace(end=mine[-1].end) if mine else None


class Mark(str):
    """No characters, and what begins or ends here, as a number: a message's, or one of those below."""

    # An underscore, for the sandbox lets no template read such a name.
    __slots__ = ("_number",)
    _number: int

    def __new__(cls, number: int) -> Mark:
        mark = super().__new__(cls)
        mark._number = number
        return mark

    def __str__(self) -> str:
        return self  # str() of it would forget what it remembers


_OTHER_TURN, _LOOP_END, _GENERATION, _GENERATION_END = -1, -2, -3, -4
_LOOP = -5  # minus the loop's line in the template


class MarkedText(str):
    """Text that a template captured, with the marks in it: [(place, mark)], in order."""

    __slots__ = ("_marks",)
    _marks: list[tuple[int, Mark]]

    def __new__(cls, text: str, marks: list[tuple[int, Mark]]) -> MarkedText:
        marked = super().__new__(cls, text)
        marked._marks = marks
        return marked

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return join((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return join((other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        text = super().__getitem__(key)
        if not isinstance(key, slice) or key.step not in (None, 1):
            return text
        start, end, _ = key.indices(len(self))
        return self._part(start, max(start, end))

    def _part(self, start: int, end: int) -> str:
        # A mark beyond the part moves to its edge, so that what begins in it still ends.
        marks = [(min(max(place, start), end) - start, mark) for place, mark in self._marks]
        return MarkedText(super().__getitem__(slice(start, end)), marks)

    def strip(self, chars: str | None = None, /) -> str:
        start = len(self) - len(super().lstrip(chars))
        return self._part(start, max(start, len(super().rstrip(chars))))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._part(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._part(0, len(super().rstrip(chars)))


def join(parts: Iterable[str]) -> str:
    """`parts` joined; with the marks in them, if there are any. Stands in for Jinja's `concat`."""
    parts = list(parts)
    marks = _places(parts)
    text = "".join(parts)
    return MarkedText(text, marks) if marks else text


def _places(parts: Sequence[str]) -> list[tuple[int, Mark]]:
    marks: list[tuple[int, Mark]] = []
    at = 0
    for part in parts:
        if isinstance(part, Mark):
            marks.append((at, part))
        elif isinstance(part, MarkedText):
            marks += [(at + place, mark) for place, mark in part._marks]
        at += len(part)
    return marks


class Message(dict):
    """A message as a template gets it: a dict that knows which message it is, by its mark."""

    __slots__ = ("_mark",)
    _mark: Mark


@cache
def _turn(number: int) -> Mark:
    return Mark(number)


def mark_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages, each an object of its own that is told by what it is, not by what it says."""
    marked = []
    for number, message in enumerate(messages):
        item = Message(message)
        item._mark = _turn(number)
        marked.append(item)
    return marked


class MarkLoops(NodeTransformer):
    """Prints a mark before each `for` loop, at the start of each turn of it, after it, and around generation blocks.

    A turn left by `continue` or `break` ends where the next begins. The mark of a turn is an attribute of the message,
    and the others are attributes of the environment (`marks`), for nothing is cheaper in a compiled template.
    """

    def __init__(self) -> None:
        self.marks: dict[str, Mark] = {
            "dft_loop_end": Mark(_LOOP_END),
            "dft_not_a_turn": Mark(_OTHER_TURN),
            "dft_generation": Mark(_GENERATION),
            "dft_generation_end": Mark(_GENERATION_END),
        }

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.generic_visit(node)
        names = [node.target, *node.target.find_all(nodes.Name)]
        # With several loop variables, whichever of them is a message.
        mark: nodes.Expr = nodes.EnvironmentAttribute("dft_not_a_turn")
        for name in names:
            if isinstance(name, nodes.Name):
                loaded = nodes.Name(name.name, "load")
                mark = nodes.Filter(loaded, "dft_mark", [nodes.Const("_mark"), mark], [], None, None)
        node.body = [nodes.Output([mark]), *node.body]
        before = f"dft_loop_{len(self.marks)}"
        self.marks[before] = Mark(_LOOP - node.lineno)
        return [self._output(before), node, self._output("dft_loop_end")]

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node | list[nodes.Node]:
        self.generic_visit(node)
        if not isinstance(node.call.node, nodes.ExtensionAttribute):
            return node
        # The only tag of an extension is `{% generation %}`, which prints its body as it is.
        return [self._output("dft_generation"), nodes.Scope(node.body), self._output("dft_generation_end")]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        # `~` would join in C and forget the marks.
        self.generic_visit(node)
        return nodes.Filter(node.nodes[0], "dft_join", node.nodes[1:], [], None, None)

    @staticmethod
    def _output(name: str) -> nodes.Output:
        return nodes.Output([nodes.EnvironmentAttribute(name)])


class MarkGenerator(CodeGenerator):
    """Prints marks as they are; `str()` around each would cost more than all the rest of them."""

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if not _is_mark(node):
            super()._output_child_pre(node, frame, finalize)

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if not _is_mark(node):
            super()._output_child_post(node, frame, finalize)


def _is_mark(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.EnvironmentAttribute) or (isinstance(node, nodes.Filter) and node.name == "dft_mark")


def join_values(*values: object) -> str:
    """Jinja's `~`."""
    return join([str(value) for value in values])


def read_marks(parts: Sequence[str]) -> Traced:
    """What a template printed, part by part, as its text and each message's stretches of it."""
    stretches: list[Stretch] = []
    generations: list[tuple[int, int]] = []
    open_generations: list[int] = []
    around: list[tuple[int, int, int]] = []  # the loops around this one: (line, the message of the turn, its start)
    line = start = at = inside = 0
    message = -1  # whose turn of the innermost loop it is; -1 where it is not a message's
    for part in parts:
        if part.__class__ is not Mark:
            if part.__class__ is MarkedText:
                return read_marks(_flat(parts))
            at += len(part)
            continue
        number = part._number  # pyright: ignore[reportAttributeAccessIssue]  # isinstance is too slow here
        if number >= _LOOP_END:
            # A loop over the messages inside another's turn says nothing of whose text it is.
            if message >= 0 and not inside:
                stretches.append(_new(Stretch, (message, start, at, line)))
            if number != _LOOP_END:
                message, start = number, at
            else:
                line, message, start = around.pop()
                if message >= 0:
                    inside -= 1
        elif number <= _LOOP:
            around.append((line, message, start))
            if message >= 0:
                inside += 1
            line, message = _LOOP - number, -1
        elif number == _GENERATION:
            open_generations.append(at)
        else:
            generations.append((open_generations.pop(), at))
    return _new(Traced, ("".join(parts), stretches, generations))


_new = tuple.__new__


def _flat(parts: Sequence[str]) -> list[str]:
    """`parts`, with captured text cut at its marks."""
    flat: list[str] = []
    for part in parts:
        if not isinstance(part, MarkedText):
            flat.append(part)
            continue
        at, text = 0, "".join((part,))
        for place, mark in part._marks:
            flat += [text[at:place], mark]
            at = place
        flat.append(text[at:])
    return flat
