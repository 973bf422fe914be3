"""Learn a template by rendering conversations made for the purpose.

Called once a build, by `render`. Answers: what is the generation prompt; how does a turn open and end;
what does the template not print (tool calls, tool results, tool lists, reasoning, names, system turns); in which
form does it want contents and a tool call's arguments; does it rewrite earlier turns. Nothing is assumed from a
template's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from dft_common.errors import SetupError
from dft_prep.template.compiled import ChatTemplate, TemplateRefusal
from dft_prep.template.spans import (
    Header,
    MaskUnsure,
    Span,
    SpanRules,
    assistant_texts,
    common_header,
    find_spans,
    is_rewritten,
)
from dft_prep.template.trace import Message, Traced, mark_messages

_USER, _REPLY, _SYSTEM = "probeuserword", "probereplyword", "probesystemword"
_RESULT, _REASON, _TOOL, _ARGUMENT = "proberesultword", "probereasonword", "probetoolname", "probeargumentword"
_NAME, _CALLED = "probenameword", "probecalledname"
_CALL_ID = "call00001"  # nine letters and digits, as some templates insist

Messages = list[dict[str, Any]]
_TOOLS = [
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


class Learnt(NamedTuple):
    """What the probes taught."""

    rules: SpanRules
    can: Capabilities
    end_of_turn: str | None
    """The control token that ends a reply, or None."""
    prompts: tuple[str, ...]
    """The generation prompts that were seen, longest first."""
    rewrites: bool
    """It may render an earlier turn otherwise than it rendered it as the last."""


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


class _Probe(NamedTuple):
    """A conversation, rendered; `spans` by the rules learnt so far."""

    messages: list[Message]
    traced: Traced
    prefixes: RenderedPrefixes

    @property
    def roles(self) -> list[str]:
        return [message["role"] for message in self.messages]

    def spans(self, rules: SpanRules) -> list[Span]:
        return find_spans(self.traced, self.roles, rules, self.prefixes)


class _Prober:
    """Renders probes, with contents in the form that the template wants."""

    def __init__(self, template: ChatTemplate, *, content_parts: bool) -> None:
        self.template = template
        self.content_parts = content_parts

    def _content(self, text: str | None) -> Any:
        return to_content(text, parts=self.content_parts)

    def user(self, text: str = _USER) -> dict[str, Any]:
        return {"role": "user", "content": self._content(text)}

    def reply(self, text: str = _REPLY, **more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": self._content(text), **more}

    def system(self) -> dict[str, Any]:
        return {"role": "system", "content": self._content(_SYSTEM)}

    def call(self, arguments: Any, content: str | None = "") -> dict[str, Any]:
        function = {"name": _CALLED, "arguments": arguments}
        call = {"id": _CALL_ID, "type": "function", "function": function}
        return {"role": "assistant", "content": self._content(content), "tool_calls": [call]}

    def result(self) -> dict[str, Any]:
        return {"role": "tool", "content": self._content(_RESULT), "name": _CALLED, "tool_call_id": _CALL_ID}

    def text(self, messages: Messages, tools: Any = None) -> str:
        """The render, or "" where the template refuses it."""
        try:
            return self.template.render(messages, tools)
        except TemplateRefusal:
            return ""

    def prints(self, word: str, messages: Messages) -> bool:
        """With tools or without: some templates refuse a conversation that has none, others one that has."""
        return word in self.text(messages) or word in self.text(messages, _TOOLS)

    def probes(self, conversations: list[Messages]) -> Iterator[_Probe]:
        for messages in conversations:
            marked = mark_messages(messages)
            for tools in (None, _TOOLS):
                try:
                    traced = self.template.trace(marked, tools)
                except TemplateRefusal:
                    continue
                yield _Probe(marked, traced, RenderedPrefixes(self.template, marked, tools))

    # What the template prints.

    def _prints_call(self, arguments: Any, wrong: str) -> bool:
        text = self.text([self.user(), self.call(arguments), self.result(), self.reply()], _TOOLS)
        text = text or self.text([self.user(), self.call(arguments)], _TOOLS)
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
        null, empty = (self.text([self.user(), call], _TOOLS) for call in calls)
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
            tool_results=self.prints(_RESULT, self.with_call(form)),
            tools=_TOOL in self.text([self.user(), self.reply()], _TOOLS),
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
        thought = f"<think>\n{_REASON}\n</think>\n\n{_REPLY}"
        return [
            [self.user(), self.reply()],
            [self.system(), self.user(), self.reply()],
            [self.user(), self.reply(), self.user(), self.reply()],
            [self.user(), self.reply(**reasons), self.user(), self.reply(**reasons)],
            [self.user(), self.reply(thought), self.user(), self.reply(thought)],
            self.with_call(form),
            [*self.with_call(form), self.user(), self.reply()],
        ]


def _make_prober(template: ChatTemplate) -> _Prober:
    """Contents as text, or as parts where the template prints only those."""
    for content_parts in (False, True):
        prober = _Prober(template, content_parts=content_parts)
        if prober.prints(_REPLY, [prober.user(), prober.reply()]):
            return prober
    return _Prober(template, content_parts=False)


def _prompt_after(template: ChatTemplate, messages: Messages, tools: Any) -> str | None:
    """What `add_generation_prompt` adds after `messages`: with it minus without it, from the last turn on.

    Not the common prefix of the whole renders, which would eat the `<` that `</s>` and `<|assistant|>` share.
    """
    try:
        marked = mark_messages(messages)
        plain, prompted = template.trace(marked, tools), template.trace(marked, tools, prompt=True)
    except TemplateRefusal:
        return None
    last = len(messages) - 1
    places = plain.place_of(last), prompted.place_of(last)
    if places[0] is None or places[1] is None or plain.text[: places[0].end] != prompted.text[: places[1].end]:
        rest = prompted.text.removeprefix(plain.text)
        return rest if rest != prompted.text and rest else None
    without, with_prompt = plain.text[places[0].end :], prompted.text[places[1].end :]
    if with_prompt == without:
        return None
    return with_prompt.removeprefix(without)


def learn(template: ChatTemplate, control_texts: tuple[str, ...], eos_token: str | None) -> Learnt:
    """Everything the probes tell. Raises SetupError where the template prints no plain conversation."""
    prober = _make_prober(template)
    can = prober.capabilities()
    probes = list(prober.probes(prober.answered(can.tool_calls)))
    found = {
        prompt
        for messages in prober.prefixes()
        for tools in (None, _TOOLS)
        if (prompt := _prompt_after(template, messages, tools))
    }
    prompts = tuple(sorted(found, key=lambda prompt: (-len(prompt), prompt)))
    closers = _closers(probes, control_texts, eos_token)
    rules = SpanRules(
        prompt=prompts[0] if len(prompts) == 1 and template.prompt_is_constant else None,
        headers=_headers(prompts, [*probes, *prober.probes([[prober.user(), prober.reply("")]])]),
        control_texts=control_texts,
        closers=closers,
        ends=(*control_texts, *closers),
        ends_turns=False,
        ends_last=False,
        results_in_reply=any(
            _RESULT in text for probe in probes for text in assistant_texts(probe.traced, probe.roles)
        ),
        tagged=template.has_generation_tags,
    )
    ends = _ends(prober, probes, rules)
    return Learnt(
        rules=msgspec.structs.replace(
            rules,
            ends_turns=bool(ends.within) and all(ends.within),
            ends_last=all(ends.last),
        ),
        can=can,
        end_of_turn=ends.token(),
        prompts=prompts,
        rewrites=_rewrites(probes, rules),
    )


def _headers(prompts: tuple[str, ...], probes: list[_Probe]) -> tuple[Header, ...]:
    turns = {turn for probe in probes for turn in assistant_texts(probe.traced, probe.roles)}
    headers = {header for prompt in prompts for turn in turns if (header := common_header(prompt, turn)).text.strip()}
    return tuple(sorted(headers, key=lambda header: (-len(header.text), header)))


def _closers(probes: list[_Probe], control_texts: tuple[str, ...], eos_token: str | None) -> tuple[str, ...]:
    """Control tokens that follow at once a reply after which its turn's own stretch prints nothing."""
    tokens = (*control_texts, *((eos_token,) if eos_token else ()))
    closers: set[str] = set()
    for probe in probes:
        text = probe.traced.text
        for message, _, end, _ in probe.traced.stretches:
            if probe.roles[message] != "assistant" or not text[:end].rstrip().endswith(_REPLY):
                continue
            after = text[end:].lstrip()
            is_last = message == len(probe.messages) - 1
            closers |= {t for t in tokens if after.startswith(t) and (is_last or t == eos_token)}
    return tuple(sorted(closers, key=lambda token: (-len(token), token)))


class _Ends(NamedTuple):
    """The control token that ends each reply of the probes, or None: of replies within, and at the end."""

    within: list[str | None]
    last: list[str | None]

    def token(self) -> str | None:
        """What ends a reply, rather at a conversation's end."""
        return next((token for token in (*self.last, *self.within) if token is not None), None)


def _ends(prober: _Prober, probes: list[_Probe], rules: SpanRules) -> _Ends:
    ends = _Ends([], [])
    refusal = "" if probes else _first_refusal(prober)
    for probe in probes:
        try:
            spans = probe.spans(rules)
        except MaskUnsure as error:
            refusal = refusal or str(error)
            continue
        for span in spans:
            text = probe.traced.text[span.start : span.end]
            end = next((token for token in rules.ends if text.endswith(token)), None)
            if span.message < len(probe.messages) - 1:
                ends.within.append(end)
            elif _REPLY in text:
                ends.last.append(end)
            else:
                refusal = refusal or "it does not print the reply where inference would have generated it"
    if not ends.last:
        raise SetupError(
            f"the chat template cannot be used: on a plain conversation, {refusal}",
            remedy="give another template with --chat_template FILE.jinja, or `--chat_template chatml`",
        )
    return ends


def _first_refusal(prober: _Prober) -> str:
    try:
        prober.template.render([prober.user(), prober.reply()])
    except TemplateRefusal as error:
        return f"it refuses: {error}"
    return "it prints nothing"


def _rewrites(probes: list[_Probe], rules: SpanRules) -> bool:
    """Whether some probe's turn is rendered otherwise when it is not the last."""
    for probe in probes:
        try:
            spans = probe.spans(rules)
        except MaskUnsure:
            continue
        if any(is_rewritten(probe.traced, span, rules, probe.prefixes) for span in spans):
            return True
    return False
