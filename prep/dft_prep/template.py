"""A chat template, compiled in a sandbox and rendered as inference would, or with marks that trace it.

Called by `spans` (which turns the marks into trained stretches) and `probes`. Templates are untrusted:
they run in Jinja's immutable sandbox, with the globals that transformers gives them and no others.

Tracing: the template's syntax tree gets a mark around the body of every `for` loop. When the loop
variable *is* one of the messages (the same object), the mark prints a nonce and the message's number.
Stripping the marks gives back the render, and each message's exact stretch of it, whatever the
template does with roles, slices or look-ahead.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_OPEN, _CLOSE = "\uf8f0", "\uf8f1"
_CAPTURES = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)


class TemplateRefusal(Exception):
    """The template raised for this conversation: its own `raise_exception`, or any error while it ran."""


class Stretch(NamedTuple):
    """Characters [start, end) of a render that belong to message number `message`."""

    message: int
    start: int
    end: int


class Traced(NamedTuple):
    """A render without its marks, and what the marks said."""

    text: str
    stretches: tuple[Stretch, ...]
    """In the order of the text; a message that a template passes over without printing has an empty one."""
    generations: tuple[tuple[int, int], ...]
    """Characters inside the template's own `{% generation %}` blocks."""


class _Tracer:
    """Prints the marks of one render. Loops may nest and may be left by `continue` or `break`."""

    def __init__(self, nonce: str) -> None:
        self.nonce = nonce
        self.numbers: dict[int, int] = {}
        self.loops: list[bool] = []

    def start(self, messages: Sequence[dict[str, Any]]) -> None:
        self.numbers = {id(message): number for number, message in enumerate(messages)}
        self.loops = []

    def mark(self, kind: str) -> str:
        return f"{_OPEN}{self.nonce}{kind}{_CLOSE}"

    def enter_loop(self) -> str:
        self.loops.append(False)
        return ""

    def begin(self, *targets: object) -> str:
        closing = self.end()
        for target in targets:
            number = self.numbers.get(id(target))
            if number is not None:
                self.loops[-1] = True
                return closing + self.mark(f"B{number}")
        return closing

    def end(self) -> str:
        is_open, self.loops[-1] = self.loops[-1], False
        return self.mark("E") if is_open else ""

    def leave_loop(self) -> str:
        closing = self.end()
        self.loops.pop()
        return closing

    def generation(self, text: str) -> str:
        return self.mark("G") + text + self.mark("H")

    def filters(self) -> dict[str, Any]:
        """The calls that `_MarkLoops` puts into a template. They take the context so that none is folded away."""

        @jinja2.pass_context
        def dft_begin(_: object, *targets: object) -> str:
            return self.begin(*targets)

        @jinja2.pass_context
        def dft_end(_: object, nothing: str) -> str:
            return self.end()

        @jinja2.pass_context
        def dft_enter_loop(_: object, nothing: str) -> str:
            return self.enter_loop()

        @jinja2.pass_context
        def dft_leave_loop(_: object, nothing: str) -> str:
            return self.leave_loop()

        return {f.__name__: f for f in (dft_begin, dft_end, dft_enter_loop, dft_leave_loop)}


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, by which some templates say themselves what is trained."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        wrap = getattr(self.environment, "dft_generation", None)
        return wrap(caller()) if wrap else caller()


class _MarkLoops(NodeTransformer):
    """Puts the tracer's calls around every loop body."""

    @staticmethod
    def _call(name: str, value: nodes.Expr, others: list[nodes.Expr]) -> nodes.Output:
        # A filter, because the sandbox makes calling a function much dearer.
        return nodes.Output([nodes.Filter(value, name, others, [], None, None)])

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.generic_visit(node)
        if isinstance(node.target, nodes.Name):
            names = [node.target.name]
        else:
            names = [name.name for name in node.target.find_all(nodes.Name)]
        loaded: list[nodes.Expr] = [nodes.Name(name, "load") for name in names]
        nothing = nodes.Const("")
        node.body = [
            self._call("dft_begin", loaded[0], loaded[1:]),
            *node.body,
            self._call("dft_end", nothing, []),
        ]
        return [self._call("dft_enter_loop", nothing, []), node, self._call("dft_leave_loop", nothing, [])]


class _TemplateDict:
    """`dict` as a template may call it, without the attributes of the real one."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """A namespace that refuses names with an underscore, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} in a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not Jinja's own filter, which escapes HTML; this is transformers' one.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(date: datetime.date) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    day = datetime.datetime(date.year, date.month, date.day)
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=day.strftime,
        dict=_TemplateDict(),
        namespace=_TemplateNamespace,
    )
    return environment


class ChatTemplate:
    """A compiled chat template. Raises TemplateRefusal where the source is not a template.

    named_tokens: `bos_token`, `eos_token` ..., as the tokenizer's config has them.
    date: what `strftime_now` prints.
    """

    def __init__(self, source: str, named_tokens: dict[str, str], date: datetime.date) -> None:
        self.source = source
        self.named_tokens = named_tokens
        self.nonce = secrets.token_hex(16)
        self._tracer = _Tracer(self.nonce)
        self._marks = re.compile(f"{_OPEN}{self.nonce}([BEGH])(\\d*){_CLOSE}")
        self._plain = self._compile(_environment(date), None)
        marking = _environment(date)
        marking.filters.update(self._tracer.filters())
        marking.extend(dft_generation=self._tracer.generation)
        self._marked = self._compile(marking, _MarkLoops())
        tree = marking.parse(source)
        # Marks that a template only prints cannot change it. Marks inside a block that it captures could be
        # measured or cut, so that then every render is compared with the unmarked one.
        self.captures = any(tree.find(kind) is not None for kind in _CAPTURES)
        self.has_generation_tags = "endgeneration" in source

    def _compile(self, environment: ImmutableSandboxedEnvironment, transform: _MarkLoops | None) -> jinja2.Template:
        try:
            tree = environment.parse(self.source)
            if transform is not None:
                tree = transform.visit(tree)
            code = environment.compile(tree, filename="chat_template")
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRefusal(f"line {error.lineno}: {error.message}") from None
        except jinja2.TemplateError as error:
            raise TemplateRefusal(str(error)) from None
        # A plain dict: Jinja copies the globals for every render, and its own ChainMap is slow to copy.
        return environment.template_class.from_code(environment, code, dict(environment.globals))

    def _run(self, template: jinja2.Template, messages: list, tools: Any, prompt: bool) -> str:
        try:
            return template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self.named_tokens
            )
        except RecursionError:
            raise TemplateRefusal("recurses without end") from None
        except Exception as error:  # a template may raise whatever Python raises
            raise TemplateRefusal(str(error) or type(error).__name__) from None

    def render(self, messages: list[dict[str, Any]], tools: Any = None, *, prompt: bool = False) -> str:
        """The text that inference would see; `prompt` asks for the generation prompt at its end."""
        return self._run(self._plain, messages, tools, prompt)

    def trace(self, messages: list[dict[str, Any]], tools: Any = None, *, prompt: bool = False) -> Traced:
        """The same text, with each message's stretch of it."""
        self._tracer.start(messages)
        return self._split(self._run(self._marked, messages, tools, prompt))

    def _split(self, marked: str) -> Traced:
        pieces: list[str] = []
        stretches: list[Stretch] = []
        generations: list[tuple[int, int]] = []
        open_messages: list[tuple[int, int]] = []
        open_generations: list[int] = []
        parts = self._marks.split(marked)
        pieces.append(parts[0])
        at = len(parts[0])
        for kind, number, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            if kind == "B":
                open_messages.append((int(number), at))
            elif kind == "E":
                message, start = open_messages.pop()
                if not open_messages:
                    stretches.append(Stretch(message, start, at))
            elif kind == "G":
                open_generations.append(at)
            else:
                generations.append((open_generations.pop(), at))
            pieces.append(text)
            at += len(text)
        return Traced("".join(pieces), tuple(stretches), tuple(generations))
