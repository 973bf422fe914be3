"""Conversation -> rendered text with trained spans: the one place where a template meets the data.

Called by `work` for every conversation, and by `checks` and `preview`. Text stays text: where a message
holds the text of a control token, it is swapped for a stand-in before rendering, so that the control
tokens found in the render are exactly those that the template wrote.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from dft_common.errors import DataError, SetupError
from dft_common.records import Conversation, ToolCall
from dft_common.records import Message as GivenMessage
from dft_prep.codes.table import CODES
from dft_prep.template.compiled import ChatTemplate, TemplateRefusal
from dft_prep.template.learnt import learn
from dft_prep.template.probes import RenderedPrefixes, text_of, to_content, with_reasoning
from dft_prep.template.sandbox import WATCH, RenderLimit
from dft_prep.template.spans import MaskUnsure, Span, ends_in_token, find_spans, is_rewritten
from dft_prep.template.stand_ins import ControlTexts, StandIns
from dft_prep.template.trace import Message, Traced, mark_messages
from dft_prep.tokenizer_files import TokenizerFiles

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class RenderOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The flags that decide what a render holds and trains."""

    train_on: Literal["all", "last"] = "all"
    unroll_turns: bool = False
    unsupported_tools: Literal["text", "quarantine", "error"] = "text"
    special_tokens_in_text: Literal["encode", "quarantine", "error"] = "encode"
    chat_template_kwargs: Mapping[str, Any] = {}
    """Variables that every render gets, as inference will (`enable_thinking`)."""


class RenderRefusal(Exception):
    """This conversation is left out: `code`, the JSON path, and the reason."""

    def __init__(self, code: str, path: str, message: str) -> None:
        super().__init__(message)
        self.code, self.path, self.message = code, path, message


class TrainedSpan(NamedTuple):
    """Characters [start, end) of the render that are trained with this weight."""

    start: int
    end: int
    weight: float


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation as text."""

    text: str
    """With stand-ins for control tokens that are text; `restore` puts the text back."""
    spans: tuple[TrainedSpan, ...]
    notes: tuple[str, ...]
    """Codes of what is not trained as given; counted, and warned of."""
    stand_ins: StandIns | None
    turns: tuple[int, ...] = ()
    """The message that each span is of."""

    def restore(self, text: str) -> str:
        """A part of the text, with the control tokens' texts put back."""
        return self.stand_ins.restore(text) if self.stand_ins is not None else text


class Prepared(NamedTuple):
    """A conversation as the template gets it, and its trace."""

    messages: list[Message]
    tools: list[Any] | None
    stand_ins: StandIns | None
    traced: Traced


class Renderer:
    """A template and a tokenizer's control tokens, learnt once, then applied to every conversation."""

    def __init__(
        self, source: str, tokenizer: TokenizerFiles, date: datetime.date, options: RenderOptions | None = None
    ) -> None:
        self.options = options or RenderOptions()
        self.control = ControlTexts([token.text for token in tokenizer.control_tokens()])
        variables = {**tokenizer.named_tokens(), **self.options.chat_template_kwargs}
        try:
            self.template = ChatTemplate(source, variables, date)
            with WATCH.render():
                learnt = learn(self.template, self.control.texts, tokenizer.named_tokens().get("eos_token"))
        except (TemplateRefusal, RenderLimit) as error:
            raise SetupError(
                f"the chat template cannot be used: {error}", remedy="repair it, or give another with --chat_template"
            ) from None
        self.rules, self.can = learnt.rules, learnt.can
        self.end_of_turn, self.prompts, self.rewrites = learnt.end_of_turn, learnt.prompts, learnt.rewrites
        sought = self.template.sought
        self._unsought = tuple(text for text in self.control.texts if text not in sought)

    def rows(self, conversation: Conversation) -> list[Rendered]:
        """The rows that this conversation becomes: one, or under --unroll_turns one for each turn that is trained.

        Raises RenderRefusal where the template refuses it, its mask cannot be told, or nothing is trained.
        """
        if not self.options.unroll_turns:
            return [self.render(conversation)]
        turns = [n for n, m in enumerate(conversation.messages) if m.role == "assistant" and m.weight > 0]
        if self.options.train_on == "last":
            turns = [number for number in turns if number == _last_reply(conversation)]
        if not turns:
            raise RenderRefusal("nothing_to_train", "$.messages", CODES["nothing_to_train"].meaning)
        return [self.render(through_turn(conversation, number)) for number in turns]

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation in one render. Raises RenderRefusal."""
        notes: Counter[str] = Counter()
        try:
            with WATCH.render():
                prepared = self._prepare(conversation, notes)
                traced = prepared.traced
                roles = [message["role"] for message in prepared.messages]
                prefixes = RenderedPrefixes(self.template, prepared.messages, prepared.tools)
                spans = find_spans(traced, roles, self.rules, prefixes)
                self._check_results(prepared, spans)
                trained = [span for span in spans if self._is_trained(conversation, span)]
                self._note_turns(traced, trained, len(roles) - 1, prefixes, notes)
        except (TemplateRefusal, RenderLimit) as error:
            raise RenderRefusal("template_refused", "$.messages", f"the chat template refuses it: {error}") from None
        except MaskUnsure as error:
            raise RenderRefusal("mask_unsure", "$.messages", str(error)) from None
        if not trained:
            raise RenderRefusal("nothing_to_train", "$.messages", CODES["nothing_to_train"].meaning)
        self._note_unprinted(conversation, prepared, spans, notes)
        return Rendered(
            text=traced.text,
            spans=tuple(TrainedSpan(s.start, s.end, conversation.messages[s.message].weight) for s in trained),
            notes=tuple(notes),
            stand_ins=prepared.stand_ins,
            turns=tuple(span.message for span in trained),
        )

    def prepare(self, conversation: Conversation) -> Prepared:
        """The conversation as `render` gives it to the template."""
        with WATCH.render():
            return self._prepare(conversation, Counter())

    def _prepare(self, conversation: Conversation, notes: Counter[str]) -> Prepared:
        messages, tools = self._template_messages(conversation, notes)
        if not self._holds_control_text(messages, tools):
            marked = mark_messages(messages)
            return Prepared(marked, tools, None, self.template.trace(marked, tools))
        notes["control_token_in_text"] += 1
        wanted = self.template.render(messages, tools)
        # A template may look for a control token's text in a reply, as for the `</think>` that it splits at, and
        # find nothing where a stand-in is. What it looks for in replies is its own affair, and left to it.
        for in_replies in (self.control.texts, self._unsought):
            prepared = self._with_stand_ins(messages, tools, in_replies)
            assert prepared.stand_ins is not None
            if prepared.stand_ins.restore(prepared.traced.text) == wanted:
                return prepared
        raise MaskUnsure("the template prints something else because a message holds a control token's text")

    def _holds_control_text(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> bool:
        """Whether anything but a role holds one. Raises where the options forbid it."""
        found = False
        for number, message in enumerate(messages):
            for key, value in message.items():
                if key != "role" and value is not None and self.control.found_in(value):
                    found = True
                    self._refuse_control_text(f"$.messages[{number}].{key}")
        if tools is not None and self.control.found_in(tools):
            found = True
            self._refuse_control_text("$.tools")
        return found

    def _refuse_control_text(self, path: str) -> None:
        if self.options.special_tokens_in_text == "error":
            raise DataError(
                f"{path} holds the text of a control token",
                remedy="remove it from the data, or use --special_tokens_in_text encode or quarantine",
            )
        if self.options.special_tokens_in_text == "quarantine":
            raise RenderRefusal("control_token_in_text", path, "holds the text of a control token")

    def _with_stand_ins(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, in_replies: tuple[str, ...]
    ) -> Prepared:
        everywhere = StandIns.unlike([messages, tools], self.control.texts)
        replies = everywhere.only(in_replies)
        swapped = []
        for message in messages:
            stand_ins = replies if message["role"] == "assistant" else everywhere
            swapped.append({key: item if key == "role" else stand_ins.swap(item) for key, item in message.items()})
        marked, tools = mark_messages(swapped), everywhere.swap(tools)
        return Prepared(marked, tools, everywhere, self.template.trace(marked, tools))

    def _template_messages(
        self, conversation: Conversation, notes: Counter[str]
    ) -> tuple[list[dict[str, Any]], list[Any] | None]:
        if self.can.tool_calls is None and self.options.unsupported_tools != "text":
            self._refuse_tool_calls(conversation)
        messages = [self._template_message(message, notes) for message in conversation.messages]
        tools = [_tool_object(tool) for tool in conversation.tools] or None
        if tools and not self.can.tools:
            notes["tools_not_printed"] += 1
        return messages, tools

    def _refuse_tool_calls(self, conversation: Conversation) -> None:
        for number, message in enumerate(conversation.messages):
            if not message.tool_calls:
                continue
            text = "the chat template does not print tool calls"
            if self.options.unsupported_tools == "error":
                raise DataError(
                    f"{text}, and a conversation has one ({message.tool_calls[0].name!r})",
                    remedy="use a template that prints them, or --unsupported_tools text or quarantine",
                )
            raise RenderRefusal("tool_calls_not_printed", f"$.messages[{number}].tool_calls", text)

    def _template_message(self, message: GivenMessage, notes: Counter[str]) -> dict[str, Any]:
        content = message.content
        out: dict[str, Any] = {"role": message.role, "content": content}
        if message.tool_calls and self.can.tool_calls is None:
            notes["tool_calls_as_text"] += 1
            calls = [_call_text(call) for call in message.tool_calls]
            out["content"] = "\n".join([content, *calls] if content else calls)
        elif message.tool_calls:
            out["tool_calls"] = [_call_object(call, self.can.tool_calls) for call in message.tool_calls]
            if content is None and not self.can.null_content:
                out["content"] = ""
        if message.reasoning is not None:
            out.update(with_reasoning(message.reasoning))
        if message.name is not None:
            out["name"] = message.name
        if message.tool_call_id is not None:
            out["tool_call_id"] = message.tool_call_id
        out["content"] = self._content(out["content"])
        return out

    def _check_results(self, prepared: Prepared, spans: list[Span]) -> None:
        """What is trained may not depend on what a tool answered: else the answer itself might be trained."""
        roles = [message["role"] for message in prepared.messages]
        if not self.rules.results_in_reply or "tool" not in roles:
            return
        others = [{**m, "content": self._content("0")} if m["role"] == "tool" else m for m in prepared.messages]
        other = RenderedPrefixes(self.template, mark_messages(others), prepared.tools)
        answered = self.template.trace(other.messages, prepared.tools)
        texts = [prepared.traced.text[span.start : span.end] for span in spans]
        if texts != [answered.text[s.start : s.end] for s in find_spans(answered, roles, self.rules, other)]:
            raise MaskUnsure(
                "the template prints a tool's result inside the assistant's turn, where it would be trained"
            )

    def _content(self, text: str | None) -> Any:
        return to_content(text, parts=self.can.content_parts)

    def _prints(self, role: str) -> bool:
        """Whether the template prints such a turn at all: a short text may stand in another's by chance."""
        return {"tool": self.can.tool_results, "system": self.can.system}.get(role, True)

    def _is_trained(self, conversation: Conversation, span: Span) -> bool:
        if span.end <= span.start or conversation.messages[span.message].weight <= 0:
            return False
        return self.options.train_on == "all" or span.message == _last_reply(conversation)

    def _note_turns(
        self, traced: Traced, trained: list[Span], last: int, prefixes: RenderedPrefixes, notes: Counter[str]
    ) -> None:
        if self.rewrites and any(
            span.message != last and is_rewritten(traced, span, self.rules, prefixes) for span in trained
        ):
            notes["history_rewritten"] += 1
        if self.end_of_turn is not None and not all(
            ends_in_token(traced.text[span.start : span.end], self.rules) for span in trained
        ):
            notes["reply_without_end"] += 1

    def _note_unprinted(
        self, conversation: Conversation, prepared: Prepared, spans: list[Span], notes: Counter[str]
    ) -> None:
        text = prepared.traced.text
        replies = {span.message: span for span in spans}
        at = 0  # contents are mostly printed in order
        for number, (given, message) in enumerate(zip(conversation.messages, prepared.messages, strict=True)):
            content = text_of(message["content"])
            if given.name is not None and not self.can.names and given.role != "tool":
                notes["name_not_printed"] += 1
            if given.role == "assistant":
                _, start, end = replies.get(number, (number, 0, 0))
                if content and not _holds(text, content, start, end):
                    notes["reply_rewritten"] += 1
                if given.reasoning and not _holds(text, message["reasoning"], start, end):
                    notes["reasoning_not_printed"] += 1
            elif content and not self._prints(given.role):
                notes[f"{given.role}_not_printed"] += 1
            elif content:
                found = text.find(content, at)
                if found >= 0:
                    at = found
                elif not _holds(text, content, 0, len(text)):
                    notes[f"{given.role}_not_printed"] += 1


def _holds(text: str, part: str, start: int, end: int) -> bool:
    """Whether text[start:end] has `part`, but for white space around it."""
    return text.find(part, start, end) >= 0 or text.find(part.strip(), start, end) >= 0


def _last_reply(conversation: Conversation) -> int:
    return max((n for n, message in enumerate(conversation.messages) if message.role == "assistant"), default=-1)


def through_turn(conversation: Conversation, number: int) -> Conversation:
    """The conversation up to and with message `number`, which alone is trained."""
    earlier = (msgspec.structs.replace(message, weight=0.0) for message in conversation.messages[:number])
    return Conversation(messages=(*earlier, conversation.messages[number]), tools=conversation.tools)


def _call_text(call: ToolCall) -> str:
    if call.verbatim is not None:
        return call.verbatim
    return f'{{"name":{json.dumps(call.name, ensure_ascii=False)},"arguments":{call.arguments or "{}"}}}'


def _call_object(call: ToolCall, form: str | None) -> dict[str, Any]:
    arguments: Any = call.arguments
    if form == "objects":
        try:
            parsed = json.loads(call.arguments or "{}")
        except ValueError:
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else call.arguments
    function = {"name": call.name, "arguments": arguments}
    out: dict[str, Any] = {"type": "function", "function": function}
    if call.id is not None:
        out["id"] = call.id
    return out


def _tool_object(tool: Any) -> Any:
    """A tool in OpenAI's envelope, which is what templates are written for; a bare function is put into one."""
    if isinstance(tool, dict) and "function" not in tool and "name" in tool:
        return {"type": "function", "function": dict(tool)}
    return dict(tool) if isinstance(tool, dict) else tool
