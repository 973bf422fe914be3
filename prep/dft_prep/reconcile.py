"""A raw record of any known format -> one canonical conversation, told by the record's own keys.

Called by `validate`. Each record is told by itself, so that a file may mix formats. Where two formats fit and mean
different conversations that is an error, unless the recipe says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from dft_common.records import Conversation, Message
from dft_prep.converters import RecordError, to_content, to_text, to_tools, type_name
from dft_prep.fields import short_name
from dft_prep.formats import FORMATS, MEDIA_FIELDS, SPECIAL_MESSAGES, Format
from dft_prep.formats.turns import Turns
from dft_prep.reading import AS_FOUND, Reading, mapped_place, mapped_record

_LONGEST_NAME = 60
_SHAPES = (
    "`messages`, `conversations`, `instruction` with `output`, `prompt` with `completion`, or another known format"
)


class Reconciled(msgspec.Struct, frozen=True, kw_only=True):
    conversation: Conversation
    format: str
    """Its name in `formats.FORMATS`."""
    place: Callable[[int, str], str]
    """(index of a message or -1, part of it) -> its JSON path in the record as its author wrote it."""


def reconcile(record: Any, reading: Reading = AS_FOUND) -> Reconciled:
    """The canonical conversation of `record`. Raises RecordError."""
    if not isinstance(record, dict):
        raise RecordError("not_an_object", "$", f"got {type_name(record)}, expected an object", "one object a record")
    if reading.fields:
        record = mapped_record(record, reading)
    roles = dict(reading.roles)
    form, turns = _read(record, reading.format, roles)
    _refuse_media(record)
    _add_system(record, turns)
    messages = turns.messages
    if not any(message.role == "assistant" for message in messages):
        path = turns.place(0, "").split("[")[0]
        raise RecordError("no_assistant", path, "no assistant turn: there is nothing to train", "leave it out")
    tools = turns.tools if turns.tools is not None else record.get("tools")
    tools = tools if tools is not None else record.get("functions")
    conversation = Conversation(messages=tuple(messages), tools=to_tools(tools, "$.tools") if tools else ())
    place = mapped_place(turns.place, reading) if reading.fields else turns.place
    return Reconciled(conversation=conversation, format=form.name, place=place)


def _read(record: Mapping[str, Any], wanted: str | None, roles: Mapping[str, str]) -> tuple[Format, Turns]:
    if wanted is not None:
        return FORMATS[wanted], _converted(FORMATS[wanted], record, roles)
    found = [form for form in _candidates(tuple(record)) if form.evidence(record)]
    filled = [form for form in found if len(found) == 1 or _filled(form, record)] or found[:1]
    if not filled:
        raise _unknown(record)
    filled = [_special(record) or form if form.name == "openai" else form for form in filled]
    if len(filled) == 1:
        return filled[0], _converted(filled[0], record, roles)
    return _agreed(filled, record, roles)


@functools.lru_cache(maxsize=1024)
def _candidates(keys: tuple[str, ...]) -> tuple[Format, ...]:
    """The formats that have a field among these keys."""
    there = set(keys)
    return tuple(
        form
        for form in FORMATS.values()
        if form not in SPECIAL_MESSAGES and any(path.split("[")[0] in there for path in form.fields)
    )


def _special(record: Mapping[str, Any]) -> Format | None:
    messages = record["messages"]
    # Only what is no plain text can tell them, and `available_tools` or a list as system.
    if isinstance(messages, list) and (
        record.get("available_tools") is not None
        or isinstance(record.get("system"), list)
        or any(isinstance(message, dict) and isinstance(message.get("content"), list | dict) for message in messages)
    ):
        return next((form for form in SPECIAL_MESSAGES if form.evidence(record)), None)
    return None


def _filled(form: Format, record: Mapping[str, Any]) -> bool:
    """Whether a format's fields hold something: an empty list beside a real conversation is no choice."""
    return any(record.get(path.split("[")[0]) for path in form.fields)


def _converted(form: Format, record: Mapping[str, Any], roles: Mapping[str, str]) -> Turns:
    turns = Turns(roles)
    form.convert(record, turns)
    return turns


def _agreed(forms: list[Format], record: Mapping[str, Any], roles: Mapping[str, str]) -> tuple[Format, Turns]:
    """The first of several formats, if all of them read the same conversation. Raises RecordError if not."""
    read: list[tuple[Format, Turns]] = []
    for form in forms:
        try:
            read.append((form, _converted(form, record, roles)))
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
    help = "rename the fields, or map them in a recipe (`fields`)"
    return RecordError("unknown_shape", "$", f"found {keys}; expected {_SHAPES}", help)


def _refuse_media(record: Mapping[str, Any]) -> None:
    for key in MEDIA_FIELDS:
        if key in record and record[key] and not isinstance(record[key], bool | int | float):
            message = f"the record has `{key}`, which is not trained here"
            raise RecordError("media_part", f"$.{key}", message, "leave the record out")


def _add_system(record: Mapping[str, Any], turns: Turns) -> None:
    found = [key for key in ("system", "system_prompt") if record.get(key)]
    if not found:
        return
    key = found[0]
    value = record[key]
    # Anthropic's may be a list of text blocks.
    text = to_content(value, f"$.{key}").text if isinstance(value, list) else to_text(value, f"$.{key}")
    if len(found) > 1 or (turns.messages and turns.messages[0].role == "system"):
        message = f"there is a `{key}` field, and a system turn or field as well"
        raise RecordError("ambiguous_shape", f"$.{key}", message, "keep one of them")
    if text:
        turns.add_first(Message(role="system", content=text), key)
