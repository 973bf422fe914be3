"""Where the parts of a message stand in the object that its author wrote: `content` may be `value`, a call a block.

Asked by `turns` for findings alone: ordinary records never pay for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dft_prep.reconcile.converters import (
    CALL_PARTS,
    CALL_ROLES,
    REASONING_PARTS,
    to_tool_calls_from_text,
    value_of_part,
)

WEIGHT_KEYS = ("weight", "train", "loss_weight", "loss")
"""What a message's loss counts for; `loss` is ms-swift's and XTuner's."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
ALIKE = (("role", "from"), ("content", "value"), WEIGHT_KEYS, REASONING_KEYS)
"""Names of one part of a message: those that are there must agree."""


def role_key(item: Mapping[str, Any]) -> str:
    return "from" if item.get("role") is None and "from" in item else "role"


def content_key(item: Mapping[str, Any]) -> str:
    # An empty one beside one that says something is no content.
    content, value = item.get("content"), item.get("value")
    return "value" if "value" in item and (content is None or (not content and value)) else "content"


def path_of_part(item: Mapping[str, Any], part: str) -> str:
    """The path of a part of a message (`content`, `tool_calls[1]`) within its object."""
    if part == "role":
        return role_key(item)
    if part == "content":
        return content_key(item)
    if part == "reasoning":
        return _reasoning(item)
    if part == "weight":
        return _first(item, WEIGHT_KEYS)
    if part == "tool_call_id":
        return _first(item, ("tool_call_id", "tool_use_id"))
    if part.startswith("tool_calls[") and part.endswith("]"):
        number = int(part.removeprefix("tool_calls[").removesuffix("]"))
        return next((path for at, path in enumerate(_calls(item)) if at == number), part)
    return part


def _first(item: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return next((key for key in keys if item.get(key) is not None), keys[0])


def _parts(item: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(path, type, part) of every part with a type in a content of parts."""
    key = content_key(item)
    content = item.get(key)
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and isinstance(part.get("type"), str):
            yield f"{key}[{number}]", part["type"], part


def _reasoning(item: Mapping[str, Any]) -> str:
    path = next((path for path, kind, _ in _parts(item) if kind in REASONING_PARTS), None)
    return path or _first(item, REASONING_KEYS)


def _calls(item: Mapping[str, Any]) -> Iterator[str]:
    """The path of each call, in the order in which they are read."""
    key = content_key(item)
    content, calls = item.get(key), item.get("tool_calls")
    if isinstance(content, str) and item.get(role_key(item)) in CALL_ROLES:
        yield from _written_calls(content, key)
        return
    for path, kind, part in _parts(item):
        if kind in CALL_PARTS:
            value = value_of_part(part, kind)
            yield from _written_calls(value, path) if kind != "tool_use" and isinstance(value, str) else (path,)
    if isinstance(calls, str):
        yield from _written_calls(calls, "tool_calls")
    elif isinstance(calls, list):
        yield from (f"tool_calls[{number}]" for number in range(len(calls)))
    if item.get("function_call"):
        yield "function_call"


def _written_calls(text: str, path: str) -> Iterator[str]:
    """The one path of every call that a text holds."""
    yield from (path for _ in to_tool_calls_from_text(text, path))
