"""Lists of message objects, as most formats have them: roles, contents, calls, weights.

Called by the formats that hold such a list. Types that differ from file to file do not matter: only texts, calls and
weights are read, and no character of them is changed. A null field is as an absent one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import msgspec

from dft_common.records import Message, ToolCall
from dft_prep.reconcile.converters import (
    CALL_ROLES,
    OPENAI_ROLES,
    SHAREGPT_ROLES,
    Content,
    RecordError,
    quoted,
    refuse_media,
    to_content,
    to_role,
    to_text,
    to_tool_call,
    to_tool_calls,
    to_tool_calls_from_text,
    to_weight,
    type_name,
)
from dft_prep.reconcile.formats.places import REASONING_KEYS, WEIGHT_KEYS, content_key, path_of_part, role_key

MESSAGE_FIELDS: dict[str, str] = {
    "role": "role",
    "content": "content",
    "name": "name",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "tool_call_id": "tool_call_id",
    **dict.fromkeys(WEIGHT_KEYS, "weight"),
    **dict.fromkeys(REASONING_KEYS, "reasoning"),
}
"""What each field of a message object becomes."""
SHAREGPT_FIELDS: dict[str, str] = {"from": "role", "value": "content", **MESSAGE_FIELDS}


_NAMES_SHOWN = 6


class Turns:
    """The messages of a record while it is read, each with where it stands in the record."""

    def __init__(self, roles: Mapping[str, str] = MappingProxyType({}), named: Set[str] = frozenset()) -> None:
        """roles: names of roles that the recipe adds. named: fields that it maps, which come before others."""
        self.roles, self.named = roles, named
        self.messages: list[Message] = []
        self._origins: list[tuple[str, int, Mapping[str, Any] | None]] = []
        self.tools_key = "tools"
        """The field that holds the tools."""

    def known(self, names: Mapping[str, str]) -> Mapping[str, str]:
        """`names` of roles, and those of the recipe."""
        return {**names, **self.roles} if self.roles else names

    def add(self, message: Message, key: str, index: int, item: Mapping[str, Any] | None) -> None:
        """key: the field it stands in; index: its place in that list, or -1 where the field is no list; item: its
        object, whose keys and parts stand where its author wrote them, or None where the field is its text."""
        self.messages.append(message)
        self._origins.append((key, index, item))

    def add_text(self, role: Any, text: str, key: str) -> None:
        """A message that is one field's text."""
        self.add(Message(role=role, content=text), key, -1, None)

    def add_first(self, message: Message, key: str) -> None:
        self.messages.insert(0, message)
        self._origins.insert(0, (key, -1, None))

    def place(self, message_index: int, part: str) -> str:
        """The JSON path of a part of a message (or, with -1, of the record), as its author wrote it."""
        if message_index < 0:
            name, bracket, rest = part.partition("[")
            part = f"{self.tools_key}{bracket}{rest}" if name == "tools" else part
            return f"$.{part}" if part else "$"
        key, index, item = self._origins[message_index]
        base = f"$.{key}[{index}]" if index >= 0 else f"$.{key}"
        return f"{base}.{path_of_part(item, part)}" if item is not None and part else base


def the_one(record: Mapping[str, Any], keys: Sequence[str], turns: Turns) -> str:
    """The one of several fields of like meaning that is there, or the first of `keys`. Raises RecordError for two.

    A field that the recipe maps comes first; empty ones, and those that say the same, are no choice.
    """
    found = [key for key in keys if record.get(key) is not None]
    filled = [key for key in found if record[key] not in ("", [])] or found[:1]
    filled = [key for key in filled if key in turns.named] or filled
    if any(record[key] != record[filled[0]] for key in filled[1:]):
        shown = " and ".join(f"`{key}`" for key in filled)
        help = f"keep one, or map it in a recipe (`fields: {{{filled[0]}: $.{filled[0]}}}`)"
        raise RecordError("ambiguous_shape", "$", f"{shown} may each be meant", help)
    return filled[0] if filled else keys[0]


def listed(value: Any, key: str) -> list[Any]:
    """`value` as a list of messages. Raises RecordError."""
    if not isinstance(value, list):
        message = f"got {type_name(value)}, expected a list of messages"
        raise RecordError("content_type", f"$.{key}", message, "write the conversation as a list")
    if not value:
        raise RecordError("empty_conversation", f"$.{key}", "the conversation is empty", "leave the record out")
    return value


def read_messages(value: Any, key: str, turns: Turns, *, sharegpt: bool = False) -> None:
    """Add every message of the list in the record's field `key`."""
    for number, item in enumerate(listed(value, key)):
        if isinstance(item, dict) and len(item) == 2:
            # The common case, and the only one that needs to be quick.
            role, content = item.get("role"), item.get("content")
            if type(content) is str and (role == "user" or role == "assistant" or role == "system"):
                turns.add(Message(role=role, content=content), key, number, item)
                continue
        read_message(item, key, number, turns, sharegpt=sharegpt)


def read_message(item: Any, key: str, number: int, turns: Turns, *, sharegpt: bool = False) -> None:
    """Add a message. number: its place in the list, or -1 where the field is the message."""
    path = f"$.{key}[{number}]" if number >= 0 else f"$.{key}"
    if not isinstance(item, dict):
        raise RecordError("content_type", path, f"got {type_name(item)}, expected a message", "write it as an object")
    refuse_media(item, path)
    speaker, said = role_key(item), content_key(item)
    known = SHAREGPT_ROLES if sharegpt or "from" in item else OPENAI_ROLES
    if "value" in item or "from" in item:
        _refuse_contradictions(item, turns.known(known), path)
    if item.get(speaker) is None:
        message = f"there is no role; {_fields_found(item)}"
        raise RecordError("unknown_role", f"{path}.{speaker}", message, _rename("role"))
    role = to_role(item.get(speaker), turns.known(known), f"{path}.{speaker}")
    turns.add(made_message(role, item, path, said, item.get(speaker)), key, number, item)


def _refuse_contradictions(item: Mapping[str, Any], known: Mapping[str, str], path: str) -> None:
    """Raise RecordError where a message has two roles or two contents that differ."""
    roles = {key: known[item[key]] for key in ("role", "from") if isinstance(item.get(key), str) and item[key] in known}
    contents = [item[key] for key in ("content", "value") if isinstance(item.get(key), str | list) and item[key]]
    if len(set(roles.values())) > 1:
        raise _contradiction(("role", "from"), "role", path)
    if len(contents) > 1 and contents[0] != contents[1]:
        raise _contradiction(("content", "value"), "content", path)


def made_message(role: str, item: Mapping[str, Any], path: str, said: str, raw_role: Any = None) -> Message:
    """The message of a role, its content in the field `said`, with the other fields of its object. Raises RecordError.

    raw_role: what the data calls the role, where that may say that the content is a call.
    """
    content = _content(item, raw_role, path, said)
    if content.tool_calls and role != "assistant":
        message = f"the {role} turn calls a tool"
        raise RecordError("bad_tool_calls", path, message, "only assistant turns call tools: repair the role")
    if content.text is None and not (role == "assistant" and content.tool_calls):
        if content.reasoning is None or role != "assistant":
            message = f"the {role} turn has no content" + (" and calls no tool" if role == "assistant" else "")
            help = "give it text, or leave the record out"
            if said not in item:
                message, help = f"{message}; {_fields_found(item)}", _rename("content")
            raise RecordError("null_content", f"{path}.{said}", message, help)
        content = msgspec.structs.replace(content, text="")
    return Message(
        role=role,  # pyright: ignore[reportArgumentType]  # a value of the role tables, which hold only these
        content=content.text,
        reasoning=content.reasoning,
        tool_calls=content.tool_calls,
        name=_optional_text(item, "name", path),
        tool_call_id=_optional_text(item, "tool_call_id", path),
        weight=weight_of(item, path),
    )


def _fields_found(fields: Mapping[str, Any]) -> str:
    """What is there in place of what is missed, for a message."""
    return f"found {', '.join(map(quoted, list(fields)[:_NAMES_SHOWN])) or 'no fields'}"


def _rename(field: str) -> str:
    return f'name the field `{field}`, or map it in a recipe (`fields: {{"messages[].{field}": ITS_NAME}}`)'


def _content(item: Mapping[str, Any], raw_role: Any, path: str, said: str) -> Content:
    value = item.get(said)
    if raw_role in CALL_ROLES and isinstance(value, str):
        return Content(text=None, tool_calls=tuple(to_tool_calls_from_text(value, f"{path}.{said}")))
    content = to_content(value, f"{path}.{said}")
    calls = content.tool_calls
    if item.get("tool_calls"):
        calls += to_tool_calls(item["tool_calls"], f"{path}.tool_calls")
    legacy = item.get("function_call")
    # Parquet writes the absent call of a column of calls as one whose fields are null.
    if legacy and not (isinstance(legacy, dict) and all(field is None for field in legacy.values())):
        calls += _not_said_twice(to_tool_call(legacy, f"{path}.function_call"), calls, path)
    return Content(text=content.text, reasoning=_reasoning(item, content.reasoning, path, said), tool_calls=calls)


def _not_said_twice(legacy: ToolCall, calls: tuple[ToolCall, ...], path: str) -> tuple[ToolCall, ...]:
    """The older `function_call`, where no call is there; nothing where it is one of them. Raises RecordError."""
    if any((call.name, call.arguments) == (legacy.name, legacy.arguments) for call in calls):
        return ()
    if calls:
        message = "`tool_calls` and `function_call` of the message differ, and may each be meant"
        raise RecordError("ambiguous_shape", path, message, "keep one of them")
    return (legacy,)


def _reasoning(item: Mapping[str, Any], of_parts: str | None, path: str, said: str) -> str | None:
    found = {said: of_parts} if of_parts is not None else {}
    found |= {key: to_text(item[key], f"{path}.{key}") for key in REASONING_KEYS if item.get(key) is not None}
    filled = {key: text for key, text in found.items() if text} or found
    if len(set(filled.values())) > 1:
        raise _contradiction(list(filled), REASONING_KEYS[0], path)
    return next(iter(filled.values()), None)


def _optional_text(item: Mapping[str, Any], key: str, path: str) -> str | None:
    return to_text(item[key], f"{path}.{key}") if item.get(key) is not None else None


def weight_of(item: Mapping[str, Any], path: str) -> float:
    """What the loss on a message counts for. Raises RecordError."""
    found = {key: to_weight(item[key], f"{path}.{key}") for key in WEIGHT_KEYS if item.get(key) is not None}
    if len(set(found.values())) > 1:
        raise _contradiction(list(found), "weight", path)
    return next(iter(found.values()), 1.0)


def _contradiction(keys: Sequence[str], field: str, path: str) -> RecordError:
    """Fields of one message that say different things of the same. field: what a recipe calls it."""
    shown = " and ".join(f"`{key}`" for key in keys)
    help = f'keep one, or map it in a recipe (`fields: {{"messages[].{field}": {keys[-1]}}}`)'
    return RecordError("ambiguous_shape", path, f"{shown} of the message differ, and may each be meant", help)


def read_texts(value: Any, key: str, turns: Turns) -> None:
    """Add the texts of the list in the record's field `key`, which take turns, the user's first."""
    for number, text in enumerate(listed(value, key)):
        turns.add_text(("user", "assistant")[number % 2], to_text(text, f"$.{key}[{number}]"), f"{key}[{number}]")


def read_history(value: Any, turns: Turns) -> None:
    """Add `history`: pairs of [question, reply]."""
    if not isinstance(value, list):
        message = f"got {type_name(value)}, expected a list of [question, reply]"
        raise RecordError("content_type", "$.history", message, "write pairs, or leave the field out")
    for number, pair in enumerate(value):
        path = f"$.history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError("content_type", path, f"got {type_name(pair)}, expected [question, reply]", "write pairs")
        for side, role in enumerate(("user", "assistant")):
            turns.add_text(role, to_text(pair[side], f"{path}[{side}]"), f"history[{number}][{side}]")


def required_reply(record: Mapping[str, Any], keys: Sequence[str], turns: Turns) -> tuple[str, str]:
    """(field, text) of the reply, in the one of `keys` that is there. Raises RecordError where none is."""
    key = the_one(record, keys, turns)
    if record.get(key) is None:
        there = [each for each in keys if each in record]
        if not there:
            message = f"there is no reply in {' or '.join(f'`{each}`' for each in keys)}; {_fields_found(record)}"
            help = f"name its field `{key}`, or map it in a recipe (`fields: {{{key}: $.ITS_NAME}}`)"
            raise RecordError("null_content", f"$.{key}", message, help)
        message = "there is no reply"
        raise RecordError("null_content", f"$.{there[0]}", message, "give it text, or leave the record out")
    return key, to_text(record[key], f"$.{key}")
