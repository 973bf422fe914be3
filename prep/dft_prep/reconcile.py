"""A raw record of any known shape -> one canonical conversation, told by the record's own keys.

Called by `validate`. Shapes: `messages` (OpenAI), `conversations` (ShareGPT), `instruction`/`output` (Alpaca).
Types that differ from file to file do not matter, for no schema is kept: only texts, calls, tools and weights
are read, and no character of them is changed. A null field is as an absent one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dft_common.records import Conversation, Message
from dft_prep.converters import (
    CALL_ROLES,
    OPENAI_ROLES,
    SHAREGPT_ROLES,
    Content,
    RecordError,
    to_content,
    to_role,
    to_tool_call,
    to_tool_calls,
    to_tool_calls_from_text,
    to_tools,
    to_weight,
    type_name,
)
from dft_prep.reading import AS_FOUND, Reading

_WEIGHT_KEYS = ("weight", "train", "loss_weight")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = frozenset(
    ["role", "from", "content", "value", "name", "tool_calls", "function_call", "tool_call_id"]
).union(_WEIGHT_KEYS, _REASONING_KEYS)
_ALPACA_KEYS = ("instruction", "input", "output", "response", "history")
_LONGEST_NAME = 60
_SHAPES = "`messages`, `conversations`, or `instruction` with `output` or `response`"


class Reconciled(msgspec.Struct, frozen=True, kw_only=True):
    conversation: Conversation
    ignored: tuple[str, ...]
    """Fields that were not understood, such as `meta` or `messages[].timestamp`."""
    format: str = "openai"

    def place(self, message_index: int, part: str) -> str:
        """The JSON path, in the record as its author wrote it, of a part of a message (or, with -1, of the whole)."""
        path = "$" if message_index < 0 else f"$.messages[{message_index}]"
        return f"{path}.{part}" if part else path


def reconcile(record: Any, reading: Reading = AS_FOUND) -> Reconciled:
    """The canonical conversation of `record`. Raises RecordError."""
    del reading
    if not isinstance(record, dict):
        raise RecordError("not_an_object", "$", f"got {type_name(record)}, expected an object", "one object a record")
    ignored: dict[str, None] = {}
    key = _shape(record)
    if key == "instruction":
        messages, used = _alpaca(record), (*_ALPACA_KEYS, "system", "tools")
    else:
        messages = _messages(record[key], key, ignored)
        used = (key, "system", "tools", "functions")
    _prepend_system(record.get("system"), messages)
    ignored.update((_shown(name), None) for name, value in record.items() if name not in used and value is not None)
    if not any(message.role == "assistant" for message in messages):
        raise RecordError("no_assistant", f"$.{key}", "no assistant turn: there is nothing to train", "leave it out")
    tools = record.get("tools") if record.get("tools") is not None else record.get("functions")
    conversation = Conversation(messages=tuple(messages), tools=to_tools(tools, "$.tools") if tools else ())
    return Reconciled(conversation=conversation, ignored=tuple(ignored))


def _shown(name: str) -> str:
    """A field's name, for a report: short, and of whole characters (JSON allows half of one)."""
    return (
        name
        if name.isascii() and len(name) <= _LONGEST_NAME
        else name[:_LONGEST_NAME].encode("utf-8", "backslashreplace").decode()
    )


def _shape(record: Mapping[str, Any]) -> str:
    """The key that holds the conversation. Raises RecordError where none does, or more than one."""
    found = [key for key in ("messages", "conversations") if record.get(key) is not None]
    if record.get("instruction") is not None:
        found.append("instruction")
    filled = [key for key in found if record[key]]
    if len(filled) > 1:
        shown = " and ".join(f"`{key}`" for key in filled)
        raise RecordError("ambiguous_shape", "$", f"holds a conversation in {shown}", "keep one of them")
    if filled or found:
        return (filled or found)[0]
    if "messages" in record or "conversations" in record:
        raise RecordError("empty_conversation", "$", "the conversation is null", "leave the record out")
    keys = ", ".join(f"`{_shown(key)}`" for key in list(record)[:6]) or "no keys"
    raise RecordError("unknown_shape", "$", f"found {keys}; expected {_SHAPES}", "rename the fields")


def _prepend_system(system: Any, messages: list[Message]) -> None:
    if system is None or system == "":
        return
    if not isinstance(system, str):
        raise RecordError("content_type", "$.system", f"got {type_name(system)}, expected text", "write it as text")
    if messages and messages[0].role == "system":
        message = "there is a `system` field and a system turn as well"
        raise RecordError("ambiguous_shape", "$.system", message, "keep one of them")
    messages.insert(0, Message(role="system", content=system))


def _messages(value: Any, key: str, ignored: dict[str, None]) -> list[Message]:
    if not isinstance(value, list):
        message = f"got {type_name(value)}, expected a list of messages"
        raise RecordError("content_type", f"$.{key}", message, "write the conversation as a list")
    if not value:
        raise RecordError("empty_conversation", f"$.{key}", "the conversation is empty", "leave the record out")
    return [_message(item, key, number, ignored) for number, item in enumerate(value)]


def _message(item: Any, key: str, number: int, ignored: dict[str, None]) -> Message:
    if not isinstance(item, dict):
        path = f"$.{key}[{number}]"
        raise RecordError("content_type", path, f"got {type_name(item)}, expected a message", "write it as an object")
    if len(item) == 2:
        # The common case, and the only one that needs to be quick.
        role, content = item.get("role"), item.get("content")
        if type(content) is str and (role == "user" or role == "assistant" or role == "system"):
            return Message(role=role, content=content)
    path = f"$.{key}[{number}]"
    for name, value in item.items():
        if name not in _MESSAGE_KEYS and value is not None:
            ignored[f"{key}[].{_shown(name)}"] = None
    return _full_message(item, path, sharegpt=key == "conversations" or "from" in item)


def _full_message(item: dict[str, Any], path: str, *, sharegpt: bool) -> Message:
    role_key = "role" if item.get("role") is not None else "from" if "from" in item else "role"
    content_key = "content" if item.get("content") is not None else "value" if "value" in item else "content"
    role = to_role(item.get(role_key), SHAREGPT_ROLES if sharegpt else OPENAI_ROLES, f"{path}.{role_key}")
    content = _content(item, item.get(role_key), path, content_key)
    if content.tool_calls and role != "assistant":
        message = f"the {role} turn calls a tool"
        raise RecordError("bad_tool_calls", path, message, "only assistant turns call tools: repair the role")
    if content.text is None and not (role == "assistant" and content.tool_calls):
        if content.reasoning is None or role != "assistant":
            message = f"the {role} turn has no content" + (" and calls no tool" if role == "assistant" else "")
            raise RecordError("null_content", f"{path}.{content_key}", message, "give it text, or leave the record out")
        content = msgspec.structs.replace(content, text="")
    return Message(
        role=role,  # pyright: ignore[reportArgumentType]  # a value of the role tables, which hold only these
        content=content.text,
        reasoning=content.reasoning,
        tool_calls=content.tool_calls,
        name=_optional_text(item, "name", path),
        tool_call_id=_optional_text(item, "tool_call_id", path),
        weight=_weight(item, path),
    )


def _content(item: dict[str, Any], raw_role: Any, path: str, content_key: str) -> Content:
    value = item.get(content_key)
    if raw_role in CALL_ROLES and isinstance(value, str):
        return Content(text=None, tool_calls=tuple(to_tool_calls_from_text(value, f"{path}.{content_key}")))
    content = to_content(value, f"{path}.{content_key}")
    calls = content.tool_calls
    if item.get("tool_calls"):
        calls += to_tool_calls(item["tool_calls"], f"{path}.tool_calls")
    legacy = item.get("function_call")
    # Parquet writes the absent call of a column of calls as one whose fields are null.
    if legacy and not (isinstance(legacy, dict) and all(field is None for field in legacy.values())):
        calls += (to_tool_call(legacy, f"{path}.function_call"),)
    reasoning = content.reasoning
    for key in _REASONING_KEYS:
        if reasoning is None and item.get(key) is not None:
            reasoning = _optional_text(item, key, path)
    return Content(text=content.text, reasoning=reasoning, tool_calls=calls)


def _optional_text(item: Mapping[str, Any], key: str, path: str) -> str | None:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise RecordError("content_type", f"{path}.{key}", f"got {type_name(value)}, expected text", "write it as text")
    return value


def _weight(item: Mapping[str, Any], path: str) -> float:
    for key in _WEIGHT_KEYS:
        if item.get(key) is not None:
            return to_weight(item[key], f"{path}.{key}")
    return 1.0


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        message = f"got {type_name(history)}, expected a list of [question, reply]"
        raise RecordError("content_type", "$.history", message, "write pairs")
    for number, pair in enumerate(history):
        path = f"$.history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError("content_type", path, f"got {type_name(pair)}, expected [question, reply]", "write pairs")
        question, reply = (_text(text, f"{path}[{side}]") for side, text in enumerate(pair))
        messages += [Message(role="user", content=question), Message(role="assistant", content=reply)]
    instruction = _text(record["instruction"], "$.instruction")
    extra = _text(record["input"], "$.input") if record.get("input") is not None else ""
    if not instruction and not extra:
        raise RecordError("empty_conversation", "$.instruction", "instruction and input are empty", "leave it out")
    key = "output" if record.get("output") is not None or "response" not in record else "response"
    reply = record.get(key)
    if reply is None:
        raise RecordError("null_content", f"$.{key}", "there is no reply", "give it text, or leave the record out")
    question = "\n".join(text for text in (instruction, extra) if text)
    messages += [Message(role="user", content=question), Message(role="assistant", content=_text(reply, f"$.{key}"))]
    return messages


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise RecordError("content_type", path, f"got {type_name(value)}, expected text", "write it as text")
    return value
