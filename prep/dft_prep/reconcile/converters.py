"""Small converters from what is found in the wild to the canonical message: roles, contents, calls, tools, weights.

Called by `reconcile`. None of them changes a character of a text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from dft_common.records import ROLES, ToolCall

OPENAI_ROLES = {
    **{role: role for role in ROLES},
    "function": "tool",
    "tool_call": "assistant",
    "tool_response": "tool",
}
SHAREGPT_ROLES = {
    **OPENAI_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")

_QUOTED = 60
_TEXT_KEYS = ("text", "value", "content")
_TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking")
CALL_PARTS = ("tool_call", "function_call", "tool_use")
MEDIA_PARTS = (
    *("image_url", "image", "input_image", "input_audio", "audio", "audio_url", "video", "video_url"),
    *("file", "input_file", "document"),
)
MEDIA_FIELDS = ("images", "image", "audios", "audio", "videos", "video")
"""Fields of a record or of a message that hold what is not trained here."""
_no_media = frozenset(MEDIA_FIELDS).isdisjoint


class RecordError(Exception):
    """A record that cannot be reconciled: `code`, where in it (`path`), what was found, what to do."""

    def __init__(self, code: str, path: str, message: str, help: str) -> None:
        super().__init__(message)
        self.code, self.path, self.message, self.help = code, path, message, help


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What a list of parts holds."""

    text: str | None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


def type_name(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def quoted(value: Any) -> str:
    """A value of the data, for a message: what a line has room for."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def to_text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise RecordError("content_type", path, f"got {type_name(value)}, expected text", "write it as text")
    return value


def to_role(role: Any, known: Mapping[str, str], path: str) -> str:
    found = known.get(role) if isinstance(role, str) else None
    if found is None:
        shown = ", ".join(sorted({name for name in known if known is SHAREGPT_ROLES or name in ROLES}))
        close = difflib.get_close_matches(role, known, n=1) if isinstance(role, str) else []
        meant = f"did you mean {close[0]!r}? " if close else ""
        help = f"{meant}rename it, or map it with `roles` in a recipe"
        raise RecordError("unknown_role", path, f"got {quoted(role)}, expected one of {shown}", help)
    return found


def to_content(value: Any, path: str) -> Content:
    """Text, or a list of parts: texts joined without adding a character, reasoning and tool calls apart."""
    if isinstance(value, str) or value is None:
        return Content(text=value)
    if not isinstance(value, list):
        message = f"got {type_name(value)}, expected text or a list of parts"
        raise RecordError("content_type", path, message, "write the content as text")
    texts: list[str] = []
    reasons: list[str] = []
    calls: list[ToolCall] = []
    for number, part in enumerate(value):
        _add_part(part, f"{path}[{number}]", texts, reasons, calls)
    return Content(
        text="".join(texts) if texts else None,
        reasoning="".join(reasons) if reasons else None,
        tool_calls=tuple(calls),
    )


def _add_part(part: Any, path: str, texts: list[str], reasons: list[str], calls: list[ToolCall]) -> None:
    if isinstance(part, str):
        _refuse_late("text", part, path, texts, calls)
        texts.append(part)
        return
    # Parquet gives every part every key, so that null is as absent.
    kind = (part.get("type") or _untyped(part)) if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        message = f"a part of type {kind}, which is not trained here"
        raise RecordError("media_part", path, message, "leave the record out")
    if not isinstance(part, dict) or kind not in (*_TEXT_PARTS, *REASONING_PARTS, *CALL_PARTS):
        found = f"a part of type {quoted(kind)}" if isinstance(part, dict) else type_name(part)
        message = f"got {found}; text, reasoning and tool_call can be trained"
        raise RecordError("unsupported_part", path, message, "write it as text, or leave the record out")
    value = value_of_part(part, kind)
    if kind == "tool_use":
        calls.append(_to_tool_use(part, path))
    elif kind in CALL_PARTS:
        calls += to_tool_calls_from_text(value, path) if isinstance(value, str) else [to_tool_call(value, path)]
    elif not isinstance(value, str):
        message = f"got {type_name(value)} as the part's text"
        raise RecordError("content_type", path, message, "write the part as {'type': 'text', 'text': ...}")
    else:
        _refuse_late(kind, value, path, texts, calls)
        (reasons if kind in REASONING_PARTS else texts).append(value)


def _refuse_late(kind: str, value: str, path: str, texts: list[str], calls: list[ToolCall]) -> None:
    """Raise RecordError for a part behind one that comes after it in a turn: it would be trained in another order."""
    said = kind in REASONING_PARTS and any(text.strip() for text in texts)
    if (calls or said) and value.strip():
        message = (
            f"a part of type {kind} behind a {'tool call' if calls else 'text'}: a turn has reasoning, text, calls"
        )
        raise RecordError("unsupported_part", path, message, "begin another turn with it, or leave the record out")


def value_of_part(part: Mapping[str, Any], kind: str) -> Any:
    """What a part of a type holds, by any of the names that it has."""
    return next((part[key] for key in (kind, *_TEXT_KEYS) if part.get(key) is not None), None)


def _to_tool_use(part: Mapping[str, Any], path: str) -> ToolCall:
    """Anthropic's block of a call: `{"type": "tool_use", "id", "name", "input"}`."""
    name, identity, given = part.get("name"), part.get("id"), part.get("input")
    if not isinstance(name, str):
        raise RecordError("bad_tool_calls", path, "a tool_use block without a name", "give it the tool's name")
    arguments = compact_json({} if given is None else given, f"{path}.input")
    return ToolCall(name=name, arguments=arguments, id=identity if isinstance(identity, str) else None)


def _untyped(part: Mapping[str, Any]) -> str:
    """The type of a part without one: what it holds."""
    return next((key for key in MEDIA_PARTS if part.get(key) is not None), "text")


def refuse_media(value: Mapping[str, Any], path: str) -> None:
    """Raise RecordError where a record or a message has pictures, sounds or videos in a field of its own."""
    if _no_media(value):
        return
    for key in MEDIA_FIELDS:
        if key in value and not _is_blank(value[key]):
            message = f"`{key}` holds what is not trained here"
            raise RecordError("media_part", f"{path}.{key}", message, "leave the record out")


def _is_blank(value: Any) -> bool:
    """Whether nothing is there. Parquet may write no picture as one whose fields are null."""
    if isinstance(value, dict):
        return all(map(_is_blank, value.values()))
    return all(map(_is_blank, value)) if isinstance(value, list) else not value or isinstance(value, bool | int | float)


_MAYBE_BEYOND = re.compile(r"[eE]\+?0*[1-9][0-9]{2}|[0-9]{300}")
"""What a number beyond the range of a float has: an exponent of three digits, or as many digits itself."""
_NO_ARGUMENTS = msgspec.Raw(b"null")


class _WrittenFunction(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = _NO_ARGUMENTS
    parameters: msgspec.Raw = _NO_ARGUMENTS


class _WrittenCall(msgspec.Struct):
    """A function with its arguments, or OpenAI's form, where these stand one level deeper."""

    name: str | None = None
    arguments: msgspec.Raw = _NO_ARGUMENTS
    parameters: msgspec.Raw = _NO_ARGUMENTS
    function: _WrittenFunction | None = None
    id: Any = None

    def call(self, verbatim: str | None = None) -> ToolCall:
        function = self.function or self
        if function.name is None:
            raise msgspec.ValidationError("Object missing required field `name`")
        written = (bytes(raw).decode() for raw in (function.arguments, function.parameters))
        text = next((text for text in written if text != "null"), "{}")
        return ToolCall(
            name=function.name,
            # Arguments that are a JSON text inside a JSON text.
            arguments=msgspec.json.decode(text) if text.startswith('"') else text,
            id=self.id if isinstance(self.id, str) else None,
            verbatim=verbatim,
        )


def to_tool_calls_from_text(text: str, path: str) -> list[ToolCall]:
    """A call that the source wrote as JSON text, or a list of calls. The arguments stay as they were written."""
    try:
        if text.lstrip().startswith("["):
            calls = [written.call() for written in msgspec.json.decode(text, type=list[_WrittenCall])]
        else:
            calls = [msgspec.json.decode(text, type=_WrittenCall).call(text)]
    except (msgspec.MsgspecError, RecursionError) as error:
        message = f"not a tool call as JSON with a name: {error}"
        raise RecordError("bad_tool_calls", path, message, 'write it as {"name": ..., "arguments": {...}}') from None
    for call in calls:
        _refuse_unprintable(call.arguments, path)
    return calls


def _refuse_unprintable(arguments: str, path: str) -> None:
    """Raise RecordError for arguments that a template which takes them as an object could not print: half a surrogate
    pair is no character, and a number beyond the range of a float would be printed as Infinity."""
    if "\\u" not in arguments and not _MAYBE_BEYOND.search(arguments):
        return
    try:
        value = json.loads(arguments, parse_int=float, parse_constant=str)
    except (ValueError, RecursionError):
        return  # no JSON: printed as the text that it is
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise half_pair(error, path) from None
    except RecursionError:
        pass
    except ValueError:
        message = "the arguments hold a number beyond the range of a float"
        raise RecordError("bad_tool_calls", path, message, "write a number that a float can hold") from None


def half_pair(error: UnicodeEncodeError, path: str) -> RecordError:
    """The error for what cannot be written as UTF-8."""
    found = f"half a surrogate pair, {error.object[error.start]!a}, which is no character"
    return RecordError("lone_surrogate", path, found, "repair the escape")


def to_tool_call(value: Any, path: str) -> ToolCall:
    """OpenAI's form (`{"id", "function": {"name", "arguments"}}`), or the function alone."""
    function = (value.get("function") or value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not isinstance(function, dict):
        raise RecordError(
            "bad_tool_calls", path, "a tool call without a function's name", 'write it as {"function": {"name": ...}}'
        )
    arguments = function.get("arguments")
    if arguments is None:
        arguments = function.get("parameters")
    if arguments is None:
        arguments = "{}"
    elif not isinstance(arguments, str):
        arguments = compact_json(arguments, f"{path}.arguments")
    else:
        _refuse_unprintable(arguments, f"{path}.arguments")
    identity = value.get("id")
    return ToolCall(name=name, arguments=arguments, id=identity if isinstance(identity, str) else None)


def compact_json(value: Any, path: str) -> str:
    """`value` as JSON text, for what the source wrote as an object where text belongs."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError) as error:  # 1e400 is infinite here; Parquet may hold a date
        raise RecordError("bad_tool_calls", path, f"not JSON: {error}", "write it as JSON text") from None


def to_tool_calls(value: Any, path: str) -> tuple[ToolCall, ...]:
    if isinstance(value, str):
        return tuple(to_tool_calls_from_text(value, path))
    if not isinstance(value, list):
        message = f"got {type_name(value)}, expected a list"
        raise RecordError("bad_tool_calls", path, message, "write tool_calls as a list of calls")
    return tuple(to_tool_call(call, f"{path}[{number}]") for number, call in enumerate(value))


def to_tools(value: Any, path: str) -> tuple[Any, ...]:
    """Tools as a list, as JSON text of a list, or as one tool."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        value = _tools_of_text(value, path)
    if isinstance(value, dict):
        value = [value]
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict | str) for tool in value):
        message = f"got {type_name(value)}, expected a list of tools"
        raise RecordError("bad_tools", path, message, "write each tool as an object, its JSON schema")
    # Parquet often has each tool as JSON text; a text of another kind is a tool in its author's own words.
    tools = (
        _tools_of_text(tool, f"{path}[{number}]") if isinstance(tool, str) and tool.lstrip().startswith("{") else tool
        for number, tool in enumerate(value)
    )
    return tuple(each for tool in tools for each in _declarations(tool))


def _declarations(tool: Any) -> list[Any]:
    """The functions that one of Gemini's tools declares; any other is one tool."""
    keys = ("functionDeclarations", "function_declarations")
    lists = [tool[key] for key in keys if isinstance(tool.get(key), list)] if isinstance(tool, dict) else []
    return lists[0] if lists else [tool]


def _tools_of_text(text: str, path: str) -> Any:
    """Tools that are JSON text. Raises RecordError also for what is legal there and could not be written again."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise half_pair(error, path) from None
    except (ValueError, RecursionError) as error:
        raise RecordError("bad_tools", path, f"not JSON: {error}", "write the tools as a list") from None
    return value


def to_weight(value: Any, path: str) -> float:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float) and 0 <= value <= 1:
        return float(value)
    raise RecordError(
        "bad_weight", path, f"got {quoted(value)}, expected a number from 0 to 1", "0 is context only, 1 trains"
    )
