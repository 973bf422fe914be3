"""A chat template, compiled: rendered as inference would, or traced. And what can be read from its source.

Called by `probes`, `spans` and `render`. See `sandbox` for where it runs, and `trace` for how it is traced.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes

from dft_prep.template.sandbox import RenderLimit, TemplateEnvironment, make_environment
from dft_prep.template.trace import (
    MarkGenerator,
    MarkLoops,
    Message,
    Traced,
    join,
    join_values,
    read_marks,
)

MAX_CHARACTERS = 1 << 28
"""Of one render. No conversation is as long: a template that prints more loops without end."""

_PARTS_AT_ONCE = 4096
_PER_CONVERSATION = frozenset({"messages", "tools", "documents"})


class TemplateRefusal(Exception):
    """The template raised for this conversation: its own `raise_exception`, or any other error while it ran."""


class ChatTemplate:
    """A compiled chat template. Raises TemplateRefusal where the source is not a template.

    variables: `bos_token`, `eos_token` ... as the tokenizer's config has them, and whatever else the user
        gives every render (`enable_thinking`).
    date: what `strftime_now` prints.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], date: datetime.date) -> None:
        self.source = source
        self.variables = {"documents": None, **variables}
        self._environment = make_environment(date)
        self._plain = self._compile(self._environment, None)
        marking = make_environment(date)
        marking.concat = join  # type: ignore[method-assign]
        marking.code_generator_class = MarkGenerator
        marking.filters.update(dft_mark=getattr, dft_join=join_values)
        loops = MarkLoops()
        self._marked = self._compile(marking, loops)
        marking.extend(**loops.marks)
        self.has_generation_tags = "endgeneration" in source

    def _compile(self, environment: TemplateEnvironment, marks: MarkLoops | None) -> jinja2.Template:
        try:
            tree = environment.parse(self.source)
            if marks is not None:
                tree = marks.visit(tree)
            code = environment.compile(tree, filename="chat_template")
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRefusal(f"line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise TemplateRefusal(str(error)) from None
        # A plain dict: Jinja copies the globals for every render, and its own ChainMap is slow to copy.
        return environment.template_class.from_code(environment, code, dict(environment.globals))

    def _run(self, template: jinja2.Template, messages: Sequence, tools: Any, prompt: bool) -> list[str]:
        given = {**self.variables, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
        try:
            return _take(template.root_render_func(template.new_context(given)))
        except RenderLimit:
            raise
        except RecursionError:
            raise TemplateRefusal("it recurses without end") from None
        except MemoryError:
            raise TemplateRefusal("it asks for more memory than there is") from None
        except Exception as error:  # a template may raise whatever Python raises
            raise TemplateRefusal(str(error) or type(error).__name__) from None

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, prompt: bool = False) -> str:
        """The text that inference would see; `prompt` asks for the generation prompt at its end."""
        return "".join(self._run(self._plain, messages, tools, prompt))

    def trace(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> Traced:
        """The same text, with each message's stretch of it. messages: from `mark_messages`."""
        return read_marks(self._run(self._marked, messages, tools, prompt))

    @cached_property
    def _tree(self) -> nodes.Template:
        return self._environment.parse(self.source)

    @cached_property
    def prompt_is_constant(self) -> bool:
        """Whether the generation prompt is the same after every conversation, as far as the source tells.

        It is where `add_generation_prompt` only decides, outside every loop, block and other condition,
        whether something is printed that no conversation has a part in.
        """
        uses = [name for name in self._tree.find_all(nodes.Name) if name.name == "add_generation_prompt"]
        # Names that the template itself assigns may depend on the conversation.
        assigned = {name.name for name in self._tree.find_all(nodes.Name) if name.ctx != "load"}
        changing = (assigned | _PER_CONVERSATION) - {"add_generation_prompt"}
        accounted = 0
        for node in self._tree.body:
            conditions = _conditions(node)
            if any(_names(condition) & {"add_generation_prompt"} for condition in conditions):
                if (_names(node) & changing) or any(node.find_all((nodes.For, nodes.Call, nodes.Macro))):
                    return False
                accounted += sum(name.name == "add_generation_prompt" for name in node.find_all(nodes.Name))
        return accounted == len(uses)

    @cached_property
    def sought(self) -> str:
        """The texts that the template looks for in what it is given (`'</think>' in content`), one a line."""
        looking = [*self._tree.find_all(nodes.Compare), *self._tree.find_all(nodes.Call)]
        looking += self._tree.find_all(nodes.Filter)
        found = {c.value for node in looking for c in node.find_all(nodes.Const) if isinstance(c.value, str)}
        return "\n".join(sorted(found))


def _names(node: nodes.Node) -> set[str]:
    return {name.name for name in ((node,) if isinstance(node, nodes.Name) else node.find_all(nodes.Name))}


def _conditions(node: nodes.Node) -> list[nodes.Node]:
    """The conditions in a statement of the template's outermost level."""
    return [found.test for kind in (nodes.If, nodes.CondExpr) for found in _of_kind(node, kind)]


def _of_kind(node: nodes.Node, kind: type) -> Iterable[Any]:
    if isinstance(node, kind):
        yield node
    yield from node.find_all(kind)


def _take(parts: Iterable[str]) -> list[str]:
    """All of `parts`, unless there is no end of them."""
    taken: list[str] = []
    iterator = iter(parts)
    size = 0
    while batch := list(islice(iterator, _PARTS_AT_ONCE)):
        taken += batch
        size += sum(map(len, batch))
        if size > MAX_CHARACTERS:
            raise RenderLimit(f"it prints more than {MAX_CHARACTERS:,} characters")
    return taken
