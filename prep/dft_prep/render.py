"""Conversation -> rendered text with trained spans: the one place where a template meets the data.

Called by `encode` for every conversation, and by `checks` and `preview`. Text stays text: where a message
holds the text of a control token, it is swapped for a stand-in before rendering, so that the control
tokens found in the render are exactly those that the template wrote.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from typing import Any, Literal, NamedTuple

import msgspec

from dft_common.errors import DataError, SetupError
from dft_common.records import Conversation, Message, ToolCall
from dft_prep.codes import CODES
from dft_prep.probes import Capabilities, learn_rules, probe_capabilities, with_reasoning
from dft_prep.spans import MaskUnsure, Span, SpanRules, find_spans
from dft_prep.template import ChatTemplate, TemplateRefusal, Traced
from dft_prep.tokenizer_files import TokenizerFiles

_OPEN, _CLOSE = "\uf8f2", "\uf8f3"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class RenderOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The flags that decide what a render trains."""

    train_on: Literal["all", "last"] = "all"
    unsupported_tools: Literal["text", "quarantine", "error"] = "text"
    special_tokens_in_text: Literal["encode", "quarantine", "error"] = "encode"


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
    """With stand-ins for control tokens that are text; `Renderer.restore` puts the text back."""
    spans: tuple[TrainedSpan, ...]
    notes: tuple[str, ...]
    """Codes of what the template did not print as given; counted, and warned of."""
    has_stand_ins: bool


class Renderer:
    """A template and a tokenizer's control tokens, learnt once, then applied to every conversation."""

    def __init__(
        self, source: str, tokenizer: TokenizerFiles, date: datetime.date, options: RenderOptions | None = None
    ) -> None:
        self.options = options or RenderOptions()
        self.control_texts = tuple(token.text for token in tokenizer.control_tokens())
        try:
            self.template = ChatTemplate(source, tokenizer.named_tokens(), date)
        except TemplateRefusal as error:
            raise SetupError(
                f"the chat template cannot be used: {error}", remedy="repair it, or give another with --chat_template"
            ) from None
        self.rules: SpanRules = learn_rules(self.template, self.control_texts)
        self.can: Capabilities = probe_capabilities(self.template)
        self._control = (
            re.compile("|".join(re.escape(text) for text in self.control_texts)) if self.control_texts else None
        )
        # A cheap test before the expression: every control token begins with one of a few short prefixes.
        self._prefixes = tuple(sorted({text[:2] for text in self.control_texts}))
        self._stand_in = re.compile(f"{_OPEN}{self.template.nonce}(\\d+){_CLOSE}")
        self._numbers = {text: number for number, text in enumerate(self.control_texts)}

    def render(self, conversation: Conversation) -> Rendered:
        """Raises RenderRefusal where the template refuses it, its mask cannot be told, or nothing is trained."""
        notes: Counter[str] = Counter()
        messages, tools, has_stand_ins = self.prepare(conversation, notes)
        roles = [message["role"] for message in messages]
        try:
            traced = self.template.trace(messages, tools)
            if self.template.captures and self.template.render(messages, tools) != traced.text:
                raise MaskUnsure("the template measures or changes text that was marked")
            spans = find_spans(traced, roles, self.rules, lambda number: self.prefix(messages, tools, number))
            self._check_results(roles)
        except TemplateRefusal as error:
            raise RenderRefusal("template_refused", "$.messages", f"the chat template refuses it: {error}") from None
        except MaskUnsure as error:
            raise RenderRefusal("mask_unsure", "$.messages", str(error)) from None
        trained = self._trained(conversation.messages, spans)
        if not trained:
            raise RenderRefusal("nothing_to_train", "$.messages", CODES["nothing_to_train"].meaning)
        self._note_unprinted(conversation, messages, traced, spans, notes)
        return Rendered(
            text=traced.text,
            spans=trained,
            notes=tuple(notes),
            has_stand_ins=has_stand_ins,
        )

    def prefix(self, messages: list[dict[str, Any]], tools: Any, number: int) -> str | None:
        """What inference would feed before message `number`, or None where the template refuses that."""
        try:
            return self.template.render(messages[:number], tools, prompt=True)
        except TemplateRefusal:
            return None

    def control_positions(self, text: str) -> list[tuple[int, int]]:
        """Characters [start, end) of the control tokens that the template wrote."""
        return [match.span() for match in self._control.finditer(text)] if self._control else []

    def restore(self, text: str) -> str:
        """`text` with its stand-ins replaced by the text of the control tokens they stand for."""
        return self._stand_in.sub(lambda match: self.control_texts[int(match[1])], text)

    def prepare(self, conversation: Conversation, notes: Counter[str]) -> tuple[list[dict[str, Any]], Any, bool]:
        """(messages, tools, whether stand-ins were put in) as the template gets them: each message its own object."""
        messages, tools = self._template_messages(conversation, notes)
        return messages, tools, self._protect(messages, tools, notes)

    def _template_messages(self, conversation: Conversation, notes: Counter[str]) -> tuple[list[dict[str, Any]], Any]:
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

    def _template_message(self, message: Message, notes: Counter[str]) -> dict[str, Any]:
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
        return out

    def _check_results(self, roles: list[str]) -> None:
        if self.can.results_in_reply and "tool" in roles:
            raise MaskUnsure(
                "the template prints a tool's result inside the assistant's turn, where it would be trained"
            )

    def _protect(self, messages: list[dict[str, Any]], tools: Any, notes: Counter[str]) -> bool:
        """Swap every control token's text in `messages` and `tools`, in place, for its stand-in."""
        found = False
        for number, message in enumerate(messages):
            for key, value in message.items():
                if key == "role" or value is None:
                    continue
                message[key], swapped = self._swap(value)
                if swapped and self.options.special_tokens_in_text != "encode":
                    self._refuse_control_text(number, key)
                found |= swapped
        for number in range(len(tools or ())):
            tools[number], swapped = self._swap(tools[number])
            found |= swapped
        if found:
            notes["control_token_in_text"] += 1
        return found

    def _refuse_control_text(self, number: int, key: str) -> None:
        path = f"$.messages[{number}].{key}"
        if self.options.special_tokens_in_text == "error":
            raise DataError(
                f"{path} holds the text of a control token",
                remedy="remove it from the data, or use --special_tokens_in_text encode or quarantine",
            )
        raise RenderRefusal("control_token_in_text", path, "holds the text of a control token")

    def _swap(self, value: Any) -> tuple[Any, bool]:
        if isinstance(value, str):
            if self._control is None or not any(prefix in value for prefix in self._prefixes):
                return value, False
            nonce = self.template.nonce
            swapped = self._control.sub(lambda match: f"{_OPEN}{nonce}{self._numbers[match[0]]}{_CLOSE}", value)
            return swapped, swapped != value
        if isinstance(value, dict):
            keys = [self._swap(key) for key in value]
            values = [self._swap(item) for item in value.values()]
            swapped_dict = {key: item for (key, _), (item, _) in zip(keys, values, strict=True)}
            return swapped_dict, any(swapped for _, swapped in keys + values)
        if isinstance(value, list):
            items = [self._swap(item) for item in value]
            return [item for item, _ in items], any(swapped for _, swapped in items)
        return value, False

    def _trained(self, messages: tuple[Message, ...], spans: list[Span]) -> tuple[TrainedSpan, ...]:
        if self.options.train_on == "last" and spans:
            last = max(span.message for span in spans)
            spans = [span for span in spans if span.message == last]
        return tuple(
            TrainedSpan(span.start, span.end, messages[span.message].weight)
            for span in spans
            if messages[span.message].weight > 0 and span.end > span.start
        )

    def _note_unprinted(
        self,
        conversation: Conversation,
        messages: list[dict[str, Any]],
        traced: Traced,
        spans: list[Span],
        notes: Counter[str],
    ) -> None:
        text = traced.text

        def trained(part: str, number: int) -> bool:
            return any(text.find(part, span.start, span.end) >= 0 for span in spans if span.message == number)

        for number, message in enumerate(messages):
            content = message["content"] or ""
            if message["role"] == "assistant":
                if content and not trained(content, number) and not trained(content.strip(), number):
                    notes["reply_rewritten"] += 1
                reasoning = conversation.messages[number].reasoning
                if reasoning and not trained(message["reasoning"].strip(), number):
                    notes["reasoning_not_printed"] += 1
            elif content and content not in text and content.strip() not in text:
                notes[f"{message['role']}_not_printed"] += 1


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
