"""Learn a template by rendering conversations made for the purpose.

Called once a build, by `render`. Answers: what is the generation prompt; how does a turn open and end;
what does the template not print (tool calls, tool results, tool lists, reasoning, system turns); in which
form does it want a tool call's arguments. Nothing is assumed from a template's name.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from dft_common.errors import SetupError
from dft_prep.spans import MaskUnsure, SpanRules, assistant_stretches, common_header, find_spans
from dft_prep.template import ChatTemplate, TemplateRefusal, Traced

_USER, _REPLY, _SYSTEM = "probeuserword", "probereplyword", "probesystemword"
_RESULT, _REASON, _TOOL, _ARGUMENT = "proberesultword", "probereasonword", "probetoolname", "probeargumentword"

Messages = list[dict[str, Any]]
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "A probe.",
            "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
        },
    }
]


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a template prints."""

    tool_calls: Literal["objects", "strings"] | None
    """In which form it prints a tool call's arguments right, or None where it drops calls."""
    null_content: bool
    """A tool call may come with content None (else it has to be empty text)."""
    tool_results: bool
    results_in_reply: bool
    """Prints a tool's result inside an assistant turn, so that it would be trained: such conversations are refused."""
    tools: bool
    reasoning: bool
    system: bool


def _user(text: str = _USER) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _reply(text: str = _REPLY, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _call(arguments: Any, content: str | None = "") -> dict[str, Any]:
    function = {"name": _TOOL, "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def _result() -> dict[str, Any]:
    return {"role": "tool", "content": _RESULT, "name": _TOOL, "tool_call_id": "call00001"}


def with_reasoning(text: str) -> dict[str, str]:
    """The message fields that templates read reasoning from; transformers fills in all of them too."""
    return {"reasoning_content": text, "reasoning": text, "thinking": text}


def _try(template: ChatTemplate, messages: Messages, tools: Any = None) -> str:
    try:
        return template.render(messages, tools)
    except TemplateRefusal:
        return ""


def _tool_call_form(template: ChatTemplate, arguments: Any, shown: str) -> bool:
    text = _try(template, [_user(), _call(arguments), _result(), _reply()], _TOOLS)
    text = text or _try(template, [_user(), _call(arguments)], _TOOLS)
    return _ARGUMENT in text and text.count(_TOOL) > 1 and shown not in text


def _takes_null(template: ChatTemplate, arguments: Any) -> bool:
    """Whether a call with content None prints as one with empty text does (and not the word None, say)."""
    null, empty = (_try(template, [_user(), _call(arguments, content)], _TOOLS) for content in (None, ""))
    return bool(null) and null == empty


def probe_capabilities(template: ChatTemplate) -> Capabilities:
    """What `template` prints and what it drops."""
    # An object printed as Python ({'key': ...}) or a string encoded twice ("{\"key\"...) is the wrong form.
    as_objects = _tool_call_form(template, {"key": _ARGUMENT}, "{'key'")
    as_strings = _tool_call_form(template, f'{{"key": "{_ARGUMENT}"}}', '{\\"key')
    form: Literal["objects", "strings"] | None = "objects" if as_objects else "strings" if as_strings else None
    arguments = {"key": _ARGUMENT} if form == "objects" else f'{{"key": "{_ARGUMENT}"}}'
    call = _call(arguments) if form else _reply(_ARGUMENT)
    with_result = _try(template, [_user(), call, _result(), _reply()], _TOOLS)
    reasoned = [_user(), _reply(**with_reasoning(_REASON))]
    return Capabilities(
        tool_calls=form,
        null_content=form is not None and _takes_null(template, arguments),
        tool_results=_RESULT in with_result,
        results_in_reply=_RESULT in _reply_text(template, [_user(), call, _result(), _reply()]),
        tools=_TOOL in _try(template, [_user(), _reply()], _TOOLS),
        reasoning=_REASON in _try(template, reasoned),
        system=_SYSTEM in _try(template, [{"role": "system", "content": _SYSTEM}, _user(), _reply()]),
    )


def _reply_text(template: ChatTemplate, messages: Messages) -> str:
    """All that is printed inside the assistant's stretches."""
    try:
        traced = template.trace(messages, _TOOLS)
        stretches = assistant_stretches(traced, [message["role"] for message in messages])
    except (TemplateRefusal, MaskUnsure):
        return ""
    return "".join(traced.text[stretch.start : stretch.end] for stretch in stretches)


def _prompt_after(template: ChatTemplate, messages: Messages) -> str | None:
    """What `add_generation_prompt` adds after `messages`: with it minus without it, from the last turn on.

    Not the common prefix of the whole renders, which would eat the `<` that `</s>` and `<|assistant|>` share.
    """
    try:
        plain, prompted = template.trace(messages), template.trace(messages, prompt=True)
    except TemplateRefusal:
        return None
    ends = [_last_stretch_end(traced, len(messages) - 1) for traced in (plain, prompted)]
    if None in ends or plain.text[: ends[0]] != prompted.text[: ends[1]]:
        rest = prompted.text.removeprefix(plain.text)
        return rest if rest != prompted.text and rest else None
    without, with_prompt = plain.text[ends[0] :], prompted.text[ends[1] :]
    if with_prompt == without:
        return None
    return with_prompt.removeprefix(without)


def _last_stretch_end(traced: Traced, message: int) -> int | None:
    ends = [stretch.end for stretch in traced.stretches if stretch.message == message and stretch.end > stretch.start]
    return ends[-1] if len(ends) == 1 else None


def _prefixes() -> list[Messages]:
    system = {"role": "system", "content": _SYSTEM}
    return [
        [_user()],
        [system, _user()],
        [_user(), _reply(), _user()],
        [_user(), _reply(), _result()],
    ]


def _answered() -> list[Messages]:
    system = {"role": "system", "content": _SYSTEM}
    reasons = with_reasoning(_REASON)
    return [
        [_user(), _reply()],
        [system, _user(), _reply()],
        [_user(), _reply(), _user(), _reply()],
        [_user(), _reply(**reasons), _user(), _reply(**reasons)],
    ]


def learn_rules(template: ChatTemplate, control_texts: tuple[str, ...]) -> SpanRules:
    """The rules by which `find_spans` reads this template. Raises SetupError where it prints no plain conversation."""
    prompts = {prompt for messages in _prefixes() if (prompt := _prompt_after(template, messages))}
    turns: list[str] = []
    for messages in _answered():
        try:
            traced = template.trace(messages)
            stretches = assistant_stretches(traced, [message["role"] for message in messages])
        except (TemplateRefusal, MaskUnsure):
            continue
        turns += [traced.text[stretch.start : stretch.end] for stretch in stretches]
    headers = {common_header(prompt, turn) for prompt in prompts for turn in turns} - {""}
    rules = SpanRules(
        prompts=tuple(sorted(prompts, key=lambda prompt: (-len(prompt), prompt))),
        headers=tuple(sorted(headers, key=lambda header: (-len(header), header))),
        control_texts=control_texts,
        end_of_turn=None,
        tagged=template.has_generation_tags,
    )
    return msgspec.structs.replace(rules, end_of_turn=_end_of_turn(template, rules))


def _end_of_turn(template: ChatTemplate, rules: SpanRules) -> str | None:
    """The control token that ends each probe's replies, or None where some reply ends otherwise."""
    ends: set[str | None] = set()
    refusal = "it prints nothing"
    for messages in _answered():
        try:
            traced = template.trace(messages)
            roles = [message["role"] for message in messages]
            spans = find_spans(traced, roles, rules, lambda number, m=messages: _prefix(template, m, number))
        except (TemplateRefusal, MaskUnsure) as error:
            refusal = str(error)
            continue
        for span in spans:
            text = traced.text[span.start : span.end]
            ends.add(next((token for token in rules.control_texts if text.endswith(token)), None))
    if not ends:
        raise SetupError(
            f"the chat template cannot be used: on a plain conversation, {refusal}",
            remedy="give another template with --chat_template FILE.jinja, or `--chat_template chatml`",
        )
    return ends.pop() if len(ends) == 1 else None


def _prefix(template: ChatTemplate, messages: Messages, number: int) -> str | None:
    try:
        return template.render(messages[:number], prompt=True)
    except TemplateRefusal:
        return None
