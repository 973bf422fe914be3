"""A raw record of any known format -> one canonical conversation, told by the record's own keys.

Called by `judgement`. Each record is told by itself, so that a file may mix formats. Where two formats fit and mean
different conversations that is an error, unless the recipe says which.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from dft_common.records import Conversation, Message
from dft_prep.reconcile.converters import (
    MEDIA_FIELDS,
    RecordError,
    refuse_media,
    to_content,
    to_text,
    to_tools,
    type_name,
)
from dft_prep.reconcile.fields import short_name
from dft_prep.reconcile.formats import FORMATS, SHARED_FIELDS, SPECIAL_MESSAGES, SYSTEM_FIELDS, TOOL_FIELDS, Format
from dft_prep.reconcile.formats.turns import Turns, the_one
from dft_prep.reconcile.reading import AS_FOUND, Reading, mapped_record, top_field, written_path

_SHAPES = (
    "`messages`, `conversations`, `instruction` with `output`, `prompt` with `completion`, or another known format"
)
_SIMPLE_NAME = re.compile(r"\w{1,60}", re.ASCII)
_WHOLE_TEXTS = ("text", "chat", "dialog", "dialogue")
_has_no_more = frozenset([*SHARED_FIELDS, *MEDIA_FIELDS]).isdisjoint
"""Whether a record has none of the fields that any format may have. Most have none."""


class Reconciled(msgspec.Struct, frozen=True, kw_only=True):
    conversation: Conversation
    format: str
    """Its name in `formats.FORMATS`."""
    record: Mapping[str, Any]
    """The record, with the fields that the recipe maps under the format's names."""
    place: Callable[[int, str], str]
    """(index of a message or -1, part of it) -> its JSON path in the record as its author wrote it."""


def reconcile(record: Any, reading: Reading = AS_FOUND) -> Reconciled:
    """The canonical conversation of `record`. Raises RecordError."""
    if not isinstance(record, dict):
        are_messages = isinstance(record, list) and bool(record) and isinstance(record[0], dict)
        help = 'write {"messages": [...]}, if these are messages' if are_messages else "one object a record"
        raise RecordError("not_an_object", "$", f"got {type_name(record)}, expected an object", help)
    if not reading.fields:
        return _reconciled(record, reading)
    mapped = mapped_record(record, reading)
    try:
        found = _reconciled(mapped, reading)
    except RecordError as error:
        error.path = written_path(error.path, reading)
        raise
    return msgspec.structs.replace(
        found, place=lambda message_index, part: written_path(found.place(message_index, part), reading)
    )


def _reconciled(record: dict[str, Any], reading: Reading) -> Reconciled:
    make_turns: Callable[[], Turns] = Turns
    if reading.fields or reading.roles:
        named = frozenset(top_field(field) for field, _ in reading.fields)
        make_turns = functools.partial(Turns, dict(reading.roles), named)
    form, turns = _read(record, reading.format, make_turns)
    tools: tuple[Any, ...] = ()
    if not _has_no_more(record):
        refuse_media(record, "$")
        _add_system(record, turns)
        tools = _tools(record, form, turns)
    messages = turns.messages
    if not any(message.role == "assistant" and message.weight > 0 for message in messages):
        path = turns.place(0, "").split("[")[0]
        if any(message.role == "assistant" for message in messages):
            message = "no assistant turn has a weight above 0: all of it is context"
            raise RecordError("nothing_to_train", path, message, "give one a weight, or leave it out")
        raise RecordError("no_assistant", path, "no assistant turn: there is nothing to train", "leave it out")
    conversation = Conversation(messages=tuple(messages), tools=tools)
    return Reconciled(conversation=conversation, format=form.name, record=record, place=turns.place)


def _read(record: Mapping[str, Any], wanted: str | None, make_turns: Callable[[], Turns]) -> tuple[Format, Turns]:
    if wanted is not None:
        return FORMATS[wanted], _converted(FORMATS[wanted], record, make_turns())
    found = [form for form in _candidates(tuple(record)) if form.evidence(record)]
    filled = [form for form in found if len(found) == 1 or _filled(form, record)] or found[:1]
    if not filled:
        raise _unknown(record)
    filled = [_special(record) or form if form.name == "openai" else form for form in filled]
    if len(filled) == 1:
        return filled[0], _converted(filled[0], record, make_turns())
    return _agreed(filled, record, make_turns)


@functools.lru_cache(maxsize=1024)
def _candidates(keys: tuple[str, ...]) -> tuple[Format, ...]:
    """The formats that have a field among these keys."""
    there = set(keys)
    return tuple(
        form
        for form in FORMATS.values()
        if form not in SPECIAL_MESSAGES and any(key in there for keys in form.holds for key in keys)
    )


def _special(record: Mapping[str, Any]) -> Format | None:
    messages = record["messages"]
    # Only what is no plain text can tell them, and tools or a list as system.
    if isinstance(messages, list) and (
        record.get("tools")
        or record.get("available_tools") is not None
        or isinstance(record.get("system"), list)
        or any(isinstance(message, dict) and isinstance(message.get("content"), list | dict) for message in messages)
    ):
        return next((form for form in SPECIAL_MESSAGES if form.evidence(record)), None)
    return None


def _filled(form: Format, record: Mapping[str, Any]) -> bool:
    """Whether a format's fields hold something: an empty list beside a real conversation is no choice."""
    return all(any(record.get(key) and isinstance(record[key], str | list) for key in keys) for keys in form.holds)


def _converted(form: Format, record: Mapping[str, Any], turns: Turns) -> Turns:
    form.convert(record, turns)
    return turns


def _agreed(forms: list[Format], record: Mapping[str, Any], make_turns: Callable[[], Turns]) -> tuple[Format, Turns]:
    """The first of several formats, if all of them read the same conversation. Raises RecordError if not."""
    read: list[tuple[Format, Turns]] = []
    for form in forms:
        try:
            read.append((form, _converted(form, record, make_turns())))
        except RecordError as error:
            if error.code == "media_part":
                raise
    if len(read) == len(forms) and all(turns.messages == read[0][1].messages for _, turns in read):
        return read[0]
    shown = " and ".join(form.name for form in forms)
    message = f"may be read as {shown}, which are different conversations"
    raise RecordError("ambiguous_shape", "$", message, f"keep one, or give `format: {forms[0].name}` in a recipe")


def _unknown(record: Mapping[str, Any]) -> RecordError:
    if "messages" in record or "conversations" in record:
        return RecordError("empty_conversation", "$", "the conversation is null", "leave the record out")
    keys = ", ".join(f"`{short_name(key)}`" for key in list(record)[:6]) or "no keys"
    return RecordError("unknown_shape", "$", f"found {keys}; expected {_SHAPES}", _way_out(record))


def _way_out(record: Mapping[str, Any]) -> str:
    """What to do with a record of no known format, by what it looks like."""
    prompt = record.get("prompt")
    if "parent_id" in record or (isinstance(prompt, dict) and "replies" in prompt):
        return "it is a tree of replies: write each path from its root to a leaf as `messages`"
    if ("role" in record or "from" in record) and ("content" in record or "value" in record):
        return 'it is one message: a record is a whole conversation, {"messages": [...]}'
    if any(isinstance(record.get(key), str) for key in _WHOLE_TEXTS):
        return "one text is taken apart only where it is ChatML: write its turns as `messages`"
    if "preferred_output" in record:
        return "map it in a recipe (`fields: {messages: $.input.messages, chosen: $.preferred_output}`)"
    lists = [key for key, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    texts = [key for key, value in record.items() if isinstance(value, str)]
    if len(lists) == 1:
        return f"rename the fields, or map them in a recipe (`fields: {{messages: {_path(lists[0])}}}`)"
    question, reply = map(_path, texts) if len(texts) == 2 else ("$.QUESTION", "$.REPLY")
    return f"rename the fields, or map them in a recipe (`fields: {{prompt: {question}, completion: {reply}}}`)"


def _path(key: str) -> str:
    return f"$.{key}" if _SIMPLE_NAME.fullmatch(key) else "$.ITS_NAME"


def _add_system(record: Mapping[str, Any], turns: Turns) -> None:
    key = _filled_one(record, SYSTEM_FIELDS, turns)
    if key is None:
        return
    value = record[key]
    # Anthropic's may be a list of text blocks.
    text = to_content(value, f"$.{key}").text if isinstance(value, list) else to_text(value, f"$.{key}")
    first = turns.messages[0] if turns.messages else None
    if first is not None and first.role == "system":
        if text != first.content:
            message = f"there is a `{key}` field, and another system turn as well"
            raise RecordError("ambiguous_shape", f"$.{key}", message, "keep one of them")
    elif text:
        turns.add_first(Message(role="system", content=text), key)


def _tools(record: Mapping[str, Any], form: Format, turns: Turns) -> tuple[Any, ...]:
    key = _filled_one(record, TOOL_FIELDS, turns)
    if key is None:
        return ()
    turns.tools_key = key
    tools = to_tools(record[key], f"$.{key}")
    return tools if form.tool is None else tuple(map(form.tool, tools))


def _filled_one(record: Mapping[str, Any], keys: tuple[str, ...], turns: Turns) -> str | None:
    """The one of several fields that holds something, if any does. Raises RecordError for two that differ."""
    filled = [key for key in keys if record.get(key)]
    return the_one(record, filled, turns) if filled else None
