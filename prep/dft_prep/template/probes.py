"""Conversations made to be rendered, and what a template does not print of them.

Made once a build, by `learnt`: tool calls, tool results, tool lists, reasoning, names, system turns; in which form a
template wants contents and a tool call's arguments. Nothing is assumed from a template's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from dft_prep.template.compiled import ChatTemplate, TemplateRefusal
from dft_prep.template.spans import (
    Span,
    SpanRules,
    find_spans,
)
from dft_prep.template.trace import Message, Traced, mark_messages

_USER, REPLY, _SYSTEM = "probeuserword", "probereplyword", "probesystemword"
RESULT, _REASON, _TOOL, _ARGUMENT = "proberesultword", "probereasonword", "probetoolname", "probeargumentword"
_NAME, _CALLED = "probenameword", "probecalledname"
_CALL_ID = "call00001"  # nine letters and digits, as some templates insist

Messages = list[dict[str, Any]]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "A probe.",
            "parameters": {
                "type": "object",
                "properties": {"key": {"type": "string", "description": "A key."}},
                "required": ["key"],
            },
        },
    }
]


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a template prints."""

    content_parts: bool
    """It wants a message's content as a list of parts, not as text."""
    tool_calls: Literal["objects", "strings"] | None
    """In which form it prints a tool call's arguments right, or None where it drops calls."""
    null_content: bool
    """A tool call may come with content None (else it has to be empty text)."""
    tool_results: bool
    tools: bool
    reasoning: bool
    names: bool
    system: bool


def to_content(text: str | None, *, parts: bool) -> Any:
    """A content as a template wants it: text, or a list of parts."""
    return [{"type": "text", "text": text}] if parts and text is not None else text


def text_of(content: Any) -> str:
    """The text of a content as the template gets it."""
    return content[0]["text"] if isinstance(content, list) else content or ""


def with_reasoning(text: str) -> dict[str, str]:
    """The message fields that templates read reasoning from; transformers fills in all of them too."""
    return {"reasoning_content": text, "reasoning": text, "thinking": text}


class RenderedPrefixes:
    """The `Prefixes` of one conversation, rendered when they are asked for, each once."""

    def __init__(self, template: ChatTemplate, messages: list[Message], tools: Any = None) -> None:
        self._template, self.messages, self._tools = template, messages, tools
        self._before: dict[int, Traced | None] = {}
        self._through: dict[int, str | None] = {}

    def content(self, number: int) -> str:
        return text_of(self.messages[number]["content"])

    def before(self, number: int) -> Traced | None:
        if number not in self._before:
            try:
                traced = self._template.trace(self.messages[:number], self._tools, prompt=True)
            except TemplateRefusal:
                traced = None
            self._before[number] = traced
        return self._before[number]

    def through(self, number: int) -> str | None:
        if number not in self._through:
            try:
                text = self._template.render(self.messages[: number + 1], self._tools)
            except TemplateRefusal:
                text = None
            self._through[number] = text
        return self._through[number]


class Probe(NamedTuple):
    """A conversation, rendered; `spans` by the rules learnt so far."""

    messages: list[Message]
    traced: Traced
    prefixes: RenderedPrefixes

    @property
    def roles(self) -> list[str]:
        return [message["role"] for message in self.messages]

    def spans(self, rules: SpanRules) -> list[Span]:
        return find_spans(self.traced, self.roles, rules, self.prefixes)


class Prober:
    """Renders probes, with contents in the form that the template wants."""

    def __init__(self, template: ChatTemplate, *, content_parts: bool) -> None:
        self.template = template
        self.content_parts = content_parts

    def _content(self, text: str | None) -> Any:
        return to_content(text, parts=self.content_parts)

    def user(self, text: str = _USER) -> dict[str, Any]:
        return {"role": "user", "content": self._content(text)}

    def reply(self, text: str = REPLY, **more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": self._content(text), **more}

    def system(self) -> dict[str, Any]:
        return {"role": "system", "content": self._content(_SYSTEM)}

    def call(self, arguments: Any, content: str | None = "") -> dict[str, Any]:
        function = {"name": _CALLED, "arguments": arguments}
        call = {"id": _CALL_ID, "type": "function", "function": function}
        return {"role": "assistant", "content": self._content(content), "tool_calls": [call]}

    def result(self) -> dict[str, Any]:
        return {"role": "tool", "content": self._content(RESULT), "name": _CALLED, "tool_call_id": _CALL_ID}

    def text(self, messages: Messages, tools: Any = None) -> str:
        """The render, or "" where the template refuses it."""
        try:
            return self.template.render(messages, tools)
        except TemplateRefusal:
            return ""

    def prints(self, word: str, messages: Messages) -> bool:
        """With tools or without: some templates refuse a conversation that has none, others one that has."""
        return word in self.text(messages) or word in self.text(messages, TOOLS)

    def probes(self, conversations: list[Messages]) -> Iterator[Probe]:
        for messages in conversations:
            marked = mark_messages(messages)
            for tools in (None, TOOLS):
                try:
                    traced = self.template.trace(marked, tools)
                except TemplateRefusal:
                    continue
                yield Probe(marked, traced, RenderedPrefixes(self.template, marked, tools))

    # What the template prints.

    def _prints_call(self, arguments: Any, wrong: str) -> bool:
        text = self.text([self.user(), self.call(arguments), self.result(), self.reply()], TOOLS)
        text = text or self.text([self.user(), self.call(arguments)], TOOLS)
        return _ARGUMENT in text and _CALLED in text and wrong not in text

    def arguments(self, form: str | None) -> Any:
        return {"key": _ARGUMENT} if form == "objects" else f'{{"key": "{_ARGUMENT}"}}'

    def call_form(self) -> Literal["objects", "strings"] | None:
        # An object printed as Python ({'key': ...}) or a string encoded twice ("{\"key\"...) is the wrong form.
        if self._prints_call(self.arguments("objects"), "{'key'"):
            return "objects"
        return "strings" if self._prints_call(self.arguments("strings"), '{\\"key') else None

    def _takes_null(self, form: str) -> bool:
        """Whether a call with content None prints as one with empty text does (and not the word None, say)."""
        calls = [self.call(self.arguments(form), content) for content in (None, "")]
        null, empty = (self.text([self.user(), call], TOOLS) for call in calls)
        return bool(null) and null == empty

    def with_call(self, form: str | None) -> Messages:
        call = self.call(self.arguments(form)) if form else self.reply(_ARGUMENT)
        return [self.user(), call, self.result(), self.reply()]

    def capabilities(self) -> Capabilities:
        form = self.call_form()
        reasoned = self.reply(**with_reasoning(_REASON))
        return Capabilities(
            content_parts=self.content_parts,
            tool_calls=form,
            null_content=form is not None and self._takes_null(form),
            tool_results=self.prints(RESULT, self.with_call(form)),
            tools=_TOOL in self.text([self.user(), self.reply()], TOOLS),
            reasoning=self.prints(_REASON, [self.user(), reasoned]),
            names=self.prints(_NAME, [{**self.user(), "name": _NAME}, self.reply()]),
            system=self.prints(_SYSTEM, [self.system(), self.user(), self.reply()]),
        )

    # The conversations from which the rules are learnt.

    def prefixes(self) -> list[Messages]:
        user, reply = self.user(), self.reply()
        return [[user], [self.system(), user], [user, reply, self.user()], [user, reply, self.result()]]

    def answered(self, form: str | None) -> list[Messages]:
        """Conversations that end in a reply."""
        reasons = with_reasoning(_REASON)
        thought = f"<think>\n{_REASON}\n</think>\n\n{REPLY}"
        return [
            [self.user(), self.reply()],
            [self.system(), self.user(), self.reply()],
            [self.user(), self.reply(), self.user(), self.reply()],
            [self.user(), self.reply(**reasons), self.user(), self.reply(**reasons)],
            [self.user(), self.reply(thought), self.user(), self.reply(thought)],
            self.with_call(form),
            [*self.with_call(form), self.user(), self.reply()],
        ]


def make_prober(template: ChatTemplate) -> Prober:
    """Contents as text, or as parts where the template prints only those."""
    for content_parts in (False, True):
        prober = Prober(template, content_parts=content_parts)
        if prober.prints(REPLY, [prober.user(), prober.reply()]):
            return prober
    return Prober(template, content_parts=False)
