"""`conversations` (or `conversation`): ShareGPT and what came of it.

Messages are `from`/`value` with names such as human and gpt, or `role`/`content`; or each item is a whole exchange
(`{"human": ..., "assistant": ...}`, `{"input": ..., "output": ...}`); or they are texts that take turns (LIMA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_common.records import Message
from dft_prep.reconcile.converters import CALL_ROLES, SHAREGPT_ROLES, RecordError, refuse_media, to_text
from dft_prep.reconcile.formats.choices import is_only_prompt
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.turns import (
    SHAREGPT_FIELDS,
    Turns,
    listed,
    made_message,
    read_message,
    read_texts,
    the_one,
)

CONVERSATIONS = ("conversations", "conversation")
_EXCHANGES: dict[str, str] = {
    "system": "system",
    **dict.fromkeys(("human", "user", "input"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "output"), "assistant"),
}


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    read_conversation(record, the_one(record, CONVERSATIONS, turns), turns)


def read_conversation(record: Mapping[str, Any], key: str, turns: Turns) -> None:
    """Add every message of the list in the field `key`."""
    plain = SHAREGPT_ROLES if not turns.roles else {}
    items = listed(record.get(key), key)
    if isinstance(items[0], str):
        read_texts(items, key, turns)
        return
    for number, item in enumerate(items):
        if type(item) is dict and len(item) == 2:
            # The common case, and the only one that needs to be quick.
            speaker, text = item.get("from"), item.get("value")
            if type(text) is str and type(speaker) is str and speaker in plain and speaker not in CALL_ROLES:
                role: Any = plain[speaker]
                turns.add(Message(role=role, content=text), key, number, item)
                continue
        if isinstance(item, dict) and _is_exchange(item):
            _read_exchange(item, key, number, turns)
        else:
            read_message(item, key, number, turns, sharegpt=True)


def _is_exchange(item: Mapping[str, Any]) -> bool:
    named = not any(item.get(key) is not None for key in ("role", "from", "content", "value"))
    return named and any(item.get(key) is not None for key in _EXCHANGES)


def _read_exchange(item: Mapping[str, Any], key: str, number: int, turns: Turns) -> None:
    path = f"$.{key}[{number}]"
    refuse_media(item, path)
    said: dict[str, str] = {}
    for name, role in _EXCHANGES.items():
        if item.get(name) is None or (not item[name] and role == "system"):
            continue
        if role in said and item[said[role]] != item[name]:
            message = f"`{said[role]}` and `{name}` are two turns of the {role} in one exchange"
            raise RecordError("ambiguous_shape", path, message, "keep one, or write each turn as an object of its own")
        said.setdefault(role, name)
    for role, name in said.items():
        field = f"{key}[{number}].{name}"
        if role == "assistant":
            turns.add(made_message(role, item, path, name), field, -1, None)
        else:
            turns.add_text(role, to_text(item[name], f"$.{field}"), field)


SHAREGPT = Format(
    name="sharegpt",
    fields={
        f"{key}[].{field}": f"messages[].{target}"
        for key in CONVERSATIONS
        for field, target in {**SHAREGPT_FIELDS, **dict.fromkeys(_EXCHANGES, "content")}.items()
    },
    holds=(CONVERSATIONS,),
    evidence=lambda record: any(
        record.get(key) is not None and not is_only_prompt(record, key) for key in CONVERSATIONS
    ),
    convert=_convert,
)
