"""`messages` whose contents are Anthropic's typed blocks: text, thinking, tool_use, tool_result.

A user turn that brings results becomes tool turns, and a user turn where it says something besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_common.records import Message, ToolCall
from dft_prep.converters import OPENAI_ROLES, Content, RecordError, compact_json, to_content, to_role, type_name
from dft_prep.formats.format import Format
from dft_prep.formats.turns import MESSAGE_FIELDS, Turns, listed, made_message

_BLOCKS = ("tool_use", "tool_result")


def _evidence(record: Mapping[str, Any]) -> bool:
    messages = record.get("messages")
    if not isinstance(messages, list):
        return False
    if isinstance(record.get("system"), list):
        return True
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    blocks = (block for content in contents if isinstance(content, list) for block in content)
    return any(isinstance(block, dict) and block.get("type") in _BLOCKS for block in blocks)


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    for number, item in enumerate(listed(record.get("messages"), "messages")):
        path = f"$.messages[{number}]"
        if not isinstance(item, dict):
            message = f"got {type_name(item)}, expected a message"
            raise RecordError("content_type", path, message, "write it as an object")
        role = to_role(
            item.get("role"), {**OPENAI_ROLES, **turns.roles} if turns.roles else OPENAI_ROLES, f"{path}.role"
        )
        blocks = item.get("content")
        others = blocks
        calls: list[ToolCall] = []
        if isinstance(blocks, list):
            others = []
            for place, block in enumerate(blocks):
                kind = block.get("type") if isinstance(block, dict) else None
                if kind == "tool_result":
                    _add_result(block, number, f"{path}.content[{place}]", turns)
                elif kind == "tool_use":
                    calls.append(_call(block, f"{path}.content[{place}]"))
                else:
                    others.append(block)
            if not others and not calls and blocks:
                continue  # results alone
        content = to_content(others, f"{path}.content")
        content = Content(text=content.text, reasoning=content.reasoning, tool_calls=(*content.tool_calls, *calls))
        turns.add(made_message(role, content, item, path, "content"), "messages", number, "content", "role")
    turns.tools = _tools(record.get("tools"))


def _add_result(block: Mapping[str, Any], number: int, path: str, turns: Turns) -> None:
    content = to_content(block.get("content"), f"{path}.content")
    identity = block.get("tool_use_id")
    message = Message(
        role="tool",
        content=content.text or "",  # a tool that says nothing
        tool_call_id=identity if isinstance(identity, str) else None,
    )
    turns.add(message, "messages", number, "content", "role")


def _call(block: Mapping[str, Any], path: str) -> ToolCall:
    name, identity, given = block.get("name"), block.get("id"), block.get("input")
    if not isinstance(name, str):
        raise RecordError("bad_tool_calls", path, "a tool_use block without a name", "give it the tool's name")
    arguments = compact_json({} if given is None else given, f"{path}.input")
    return ToolCall(name=name, arguments=arguments, id=identity if isinstance(identity, str) else None)


def _tools(tools: Any) -> Any:
    """Tools with `input_schema` as templates expect them; all others as they are."""
    if not isinstance(tools, list):
        return tools
    return [_tool(tool) if isinstance(tool, dict) and "input_schema" in tool else tool for tool in tools]


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


ANTHROPIC = Format(
    name="anthropic",
    fields={f"messages[].{field}": f"messages[].{target}" for field, target in MESSAGE_FIELDS.items()},
    evidence=_evidence,
    convert=_convert,
)
