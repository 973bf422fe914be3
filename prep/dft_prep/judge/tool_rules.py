"""What is odd about the tool calls of a conversation: calls and results that do not pair, arguments that do not fit.

Called by `rules` for conversations that call a tool or hold a tool's result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dft_common.records import Conversation, Message, ToolCall
from dft_prep.judge.declared_tools import DeclaredTools, NotJSON, declared_tools, decode_json, find_misfit, near
from dft_prep.judge.oddities import Oddity
from dft_prep.reconcile.converters import quoted, type_name

_MOST_OPEN = 256
"""Calls that wait for a result. More are no conversation, and pairing them would take long."""
# A call that the author wrote into the text, as many formats do: there is nothing to pair its result with.
_WRITTEN_CALLS = (
    "tool_call",
    "<function",
    "TOOL_CALLS",
    "<|python_tag|>",
    "Action:",
    "```",
    "<code",
    "<execute",
    '"name"',
)
_WRITTEN_RESULT = "<tool_response>"

_Open = tuple[int, int, ToolCall]
"""(index of the message, index of the call in it, the call)"""


def find_tool_oddities(conversation: Conversation) -> Iterator[Oddity]:
    yield from _pairs(conversation.messages)
    declared = declared_tools(conversation.tools) if conversation.tools else None
    for number, message in enumerate(conversation.messages):
        for at, call in enumerate(message.tool_calls):
            yield from _call_oddities(number, at, call, declared)


# Calls and results


def _pairs(messages: Sequence[Message]) -> Iterator[Oddity]:
    waiting: list[_Open] = []
    caller: Message | None = None
    for number, message in enumerate(messages):
        if len(waiting) > _MOST_OPEN:
            return
        if message.role == "tool":
            yield from _result(number, message, waiting, caller)
        elif message.role == "assistant":
            # Calls that are made at once may stand in turns of their own, one after another.
            if not message.tool_calls or messages[number - 1].role == "tool":
                yield from _unanswered(waiting)
            waiting += [(number, at, call) for at, call in enumerate(message.tool_calls)]
            caller = message
        elif message.role == "user":
            yield from _unanswered(waiting)
    # A conversation may end with its calls: that is the reply that it teaches.
    if messages[-1].role != "assistant":
        yield from _unanswered(waiting)


def _unanswered(waiting: list[_Open]) -> Iterator[Oddity]:
    for number, at, call in waiting:
        yield Oddity(
            "call_without_answer", number, f"tool_calls[{at}]", f"no result follows the call of {quoted(call.name)}"
        )
    waiting.clear()


def _result(number: int, message: Message, waiting: list[_Open], caller: Message | None) -> Iterator[Oddity]:
    """Take what a tool's turn answers from the calls that wait."""
    if not waiting:
        if caller is None or caller.tool_calls or not _writes_calls(caller):
            yield Oddity("answer_without_call", number, "", "a tool's turn, and no call waits for it")
        return
    ids = [call.id for _, _, call in waiting]
    identity = message.tool_call_id
    if identity is None or None in ids:
        del waiting[: _count_results(message)]
    elif identity in ids:
        del waiting[ids.index(identity)]
    else:
        expected = ", ".join(quoted(known) for known in ids[:3]) + (", ..." if len(ids) > 3 else "")
        yield Oddity("call_id_mismatch", number, "tool_call_id", f"got {quoted(identity)}, the call is {expected}")
        del waiting[0]


def _writes_calls(message: Message) -> bool:
    text = f"{message.reasoning or ''}{message.content or ''}"
    return any(sign in text for sign in _WRITTEN_CALLS)


def _count_results(message: Message) -> int:
    """How many calls a turn without an id answers: some write the results of all as one list."""
    text = message.content or ""
    if text.lstrip().startswith("["):
        try:
            value = decode_json(text)
        except (NotJSON, RecursionError):
            value = None
        return max(1, len(value)) if isinstance(value, list) else 1
    return max(1, text.count(_WRITTEN_RESULT))


# Arguments


def _call_oddities(number: int, at: int, call: ToolCall, declared: DeclaredTools | None) -> Iterator[Oddity]:
    part = f"tool_calls[{at}]"
    name = quoted(call.name)
    arguments = None
    try:
        arguments = decode_json(call.arguments)
        if not isinstance(arguments, dict):
            found = f"the arguments of {name} are {type_name(arguments)}, expected an object"
            yield Oddity("arguments_not_json", number, part, found)
    except NotJSON as error:
        what = f"not JSON: {error}" if call.arguments.strip() else "empty, expected a JSON object such as {}"
        yield Oddity("arguments_not_json", number, part, f"the arguments of {name} are {what}")
    except RecursionError:
        pass  # legal, and deeper than any tool's schema
    if declared is None:
        return
    if call.name not in declared.schemas:
        if declared.complete:
            hint = near(call.name, list(declared.schemas))
            yield Oddity("undeclared_tool", number, part, f"calls {name}, which is not declared", hint)
        return
    schema = declared.schemas[call.name]
    if isinstance(arguments, dict) and schema is not None and (misfit := find_misfit(arguments, schema)):
        yield Oddity("arguments_misfit", number, part, f"arguments of {name}: {misfit}")
