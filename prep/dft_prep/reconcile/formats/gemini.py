"""`contents` of `parts`, with `systemInstruction`: Gemini's, as its API and its tuning files have them.

A part is a text (a thought is reasoning), a function's call, or its response, which becomes a tool's turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_common.records import Message
from dft_prep.reconcile.converters import SHAREGPT_ROLES, RecordError, compact_json, to_content, to_role, type_name
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.turns import Turns, listed, made_message, the_one

_SYSTEM = ("systemInstruction", "system_instruction")
_CALLS = ("functionCall", "function_call")
_RESPONSES = ("functionResponse", "function_response")
_MEDIA = {
    **dict.fromkeys(("inlineData", "inline_data"), "image"),
    **dict.fromkeys(("fileData", "file_data"), "file"),
}


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    system = the_one(record, _SYSTEM, turns)
    if record.get(system):
        turns.add_text("system", _text(record[system], f"$.{system}"), system)
    for number, item in enumerate(listed(record.get("contents"), "contents")):
        path = f"$.contents[{number}]"
        if not isinstance(item, dict) or not isinstance(item.get("parts"), list):
            found = "no list of `parts`" if isinstance(item, dict) else type_name(item)
            raise RecordError("content_type", path, f"got {found}, expected a role and its parts", "write its parts")
        role = to_role(item.get("role"), turns.known({**SHAREGPT_ROLES, "function": "user"}), f"{path}.role")
        _add(role, item, number, turns)


def _add(role: str, item: Mapping[str, Any], number: int, turns: Turns) -> None:
    """Add the results that are among the parts, each as a turn, and then what else is said."""
    parts = item["parts"]
    results = [(at, found) for at, part in enumerate(parts) if (found := _held(part, _RESPONSES)) is not None]
    if results and role == "assistant":
        place = f"$.contents[{number}].parts[{results[0][0]}]"
        raise RecordError("unsupported_part", place, "a function's response in the model's turn", "end the turn before")
    for at, result in results:
        field = f"contents[{number}].parts[{at}]"
        turns.add(_result(result, f"$.{field}"), field, -1, None)
    if len(results) < len(parts) or not parts:
        typed = ["" if _held(part, _RESPONSES) is not None else _typed(part) for part in parts]
        message = made_message(role, {**item, "parts": typed}, f"$.contents[{number}]", "parts")
        turns.add(message, f"contents[{number}].parts", -1, None)


def _held(part: Any, keys: tuple[str, ...]) -> Any:
    return next((part[key] for key in keys if part.get(key) is not None), None) if isinstance(part, dict) else None


def _typed(part: Any) -> Any:
    """A part as others write it, with a type."""
    if not isinstance(part, dict):
        return part
    call = _held(part, _CALLS)
    if isinstance(call, dict):
        return {"type": "tool_use", "id": call.get("id"), "name": call.get("name"), "input": call.get("args")}
    if isinstance(part.get("text"), str):
        return {"type": "thinking" if part.get("thought") is True else "text", "text": part["text"]}
    kind = next((key for key, value in part.items() if value is not None), "text")
    return {"type": _MEDIA.get(kind, kind)}


def _result(result: Any, path: str) -> Message:
    response = result.get("response") if isinstance(result, dict) else None
    name, identity = (result.get(key) if isinstance(result, dict) else None for key in ("name", "id"))
    return Message(
        role="tool",
        content=response if isinstance(response, str) else compact_json(response, path),
        name=name if isinstance(name, str) else None,
        tool_call_id=identity if isinstance(identity, str) else None,
    )


def _text(system: Any, path: str) -> str:
    parts = system.get("parts") if isinstance(system, dict) else system
    return to_content(parts, path).text or ""


def _evidence(record: Mapping[str, Any]) -> bool:
    contents = record.get("contents")
    return isinstance(contents, list) and any(isinstance(item, dict) and "parts" in item for item in contents)


GEMINI = Format(
    name="gemini",
    fields={
        **dict.fromkeys(_SYSTEM, "messages[].content"),
        "contents[].role": "messages[].role",
        "contents[].parts": "messages[].content",
    },
    holds=(("contents",),),
    evidence=_evidence,
    convert=_convert,
)
