"""Lists of messages beside `chosen` and `rejected`: a conversation of its own, or only what these reply to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.reconcile.converters import SHAREGPT_ROLES


def is_only_prompt(record: Mapping[str, Any], key: str) -> bool:
    """Whether the list in `key` is what `chosen` replies to: it does not end with a reply itself."""
    if record.get("chosen") is None:
        return False
    messages = record[key]
    return isinstance(messages, list) and bool(messages) and not is_reply(messages[-1])


def is_reply(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    role = message.get("from") if message.get("role") is None else message["role"]
    return isinstance(role, str) and SHAREGPT_ROLES.get(role) == "assistant"
