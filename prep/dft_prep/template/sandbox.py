"""Where chat templates run: Jinja's immutable sandbox, with transformers' globals and no others, within limits.

Called by `template`. Templates are untrusted: no file, no attribute that leads out of the sandbox, no render
without end. What transformers gives a template at inference is given here too, and nothing else, so that a
template prints the same in both.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 10.0
MAX_GROWTH = 1 << 30
"""Bytes of memory that rendering one conversation may add."""
MAX_COUNT = 1_000_000
"""The largest number by which a template may repeat, pad or indent something."""

_LOOK_EVERY = 0.1
_PADDING_FILTERS = ("center", "indent", "batch", "slice", "wordwrap")
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\d{7,}|\*)")


class RenderLimit(Exception):
    """A template ran too long, or asked for too much."""


class _Watch:
    """Looks at the renders of this process now and then, by a timer signal.

    Only a process's main thread can have one: elsewhere there is no limit. Workers render in their main thread.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._started: float | None = None
        self._memory = 0

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """The timer runs in this block; around many renders, it is not set for each."""
        if threading.current_thread() is not threading.main_thread() or self._depth:
            yield
            return
        before = signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_EVERY, _LOOK_EVERY)
        self._depth = 1
        try:
            yield
        finally:
            self._depth = 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @contextlib.contextmanager
    def render(self) -> Iterator[None]:
        """Raise RenderLimit in this block when it lasts too long or grows too much."""
        if not self._depth:
            with self.on(), self.render():
                yield
            return
        self._started, self._memory = time.monotonic(), 0
        try:
            yield
        finally:
            self._started = None

    def _look(self, *_: object) -> None:
        if self._started is None:
            return
        if time.monotonic() - self._started > MAX_SECONDS:
            raise RenderLimit(f"it ran for more than {MAX_SECONDS:g} seconds: does it loop without end?")
        # The first look at a render only sets the mark: an ordinary one is over before it.
        self._memory = self._memory or _peak_memory()
        if _peak_memory() - self._memory > MAX_GROWTH:
            raise RenderLimit(f"it took more than {MAX_GROWTH >> 20:,} MiB of memory")


WATCH = _Watch()


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_DICT_ATTRIBUTES = frozenset(dir({}))


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, which also refuses to make something huge out of something small in a single step."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        # `message.content` of a dict: Jinja would look for an attribute first, and catch that there is none.
        if isinstance(obj, dict) and attribute not in _DICT_ATTRIBUTES and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str) and _WIDE_FORMAT.search(left):
                raise RenderLimit("a format asks for too many characters")
        elif operator == "**" or not (isinstance(left, int | float) and isinstance(right, int | float)):
            _refuse_large((left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as jinja2 has it
        _refuse_large(args)
        return super().call(__context, __obj, *args, **kwargs)


def _refuse_large(values: tuple[Any, ...]) -> None:
    for value in values:
        if value.__class__ is int and value > MAX_COUNT:
            raise RenderLimit(f"it repeats or pads something {value:,} times")


def _within_limits(filter_function: Callable[..., Any]) -> Callable[..., Any]:
    def limited(*args: Any, **kwargs: Any) -> Any:
        _refuse_large((*args, *kwargs.values()))
        return filter_function(*args, **kwargs)

    return limited


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, by which some templates say themselves what is trained."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


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


def make_environment(date: datetime.date) -> TemplateEnvironment:
    """A sandbox whose `strftime_now` prints `date`."""
    environment = TemplateEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    day = datetime.datetime(date.year, date.month, date.day)
    for name in _PADDING_FILTERS:
        environment.filters[name] = _within_limits(environment.filters[name])
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=day.strftime,
        dict=_TemplateDict(),
        namespace=_TemplateNamespace,
    )
    return environment
