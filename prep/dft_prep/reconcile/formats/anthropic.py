"""`messages` whose contents are Anthropic's typed blocks: text, thinking, tool_use, tool_result.

A user turn that brings results becomes tool turns, and a user turn where it says something besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_common.records import Message
from dft_prep.reconcile.converters import OPENAI_ROLES, RecordError, to_content, to_role
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.openai import OPENAI
from dft_prep.reconcile.formats.turns import Turns, listed, read_message

_BLOCKS = ("tool_use", "tool_result", "thinking")


def _evidence(record: Mapping[str, Any]) -> bool:
    messages = record.get("messages")
    if not isinstance(messages, list):
        return False
    if isinstance(record.get("system"), list) or _has_schemas(record.get("tools")):
        return True
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    blocks = (block for content in contents if isinstance(content, list) for block in content)
    return any(isinstance(block, dict) and block.get("type") in _BLOCKS for block in blocks)


def _has_schemas(tools: Any) -> bool:
    if isinstance(tools, str):
        return '"input_schema"' in tools
    return isinstance(tools, list) and any(isinstance(tool, dict) and "input_schema" in tool for tool in tools)


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    for number, item in enumerate(listed(record.get("messages"), "messages")):
        blocks = item.get("content") if isinstance(item, dict) else None
        if not isinstance(blocks, list) or not any(map(_is_result, blocks)):
            read_message(item, "messages", number, turns)
            continue
        role = to_role(item.get("role"), turns.known(OPENAI_ROLES), f"$.messages[{number}].role")
        if role not in ("user", "tool"):
            at = next(at for at, block in enumerate(blocks) if _is_result(block))
            message = f"a tool_result in the {role}'s turn: what comes before it and after it would be one turn"
            help = "end the turn before it, and give the result to a user's turn"
            raise RecordError("unsupported_part", f"$.messages[{number}].content[{at}]", message, help)
        for at, block in enumerate(blocks):
            if _is_result(block):
                _add_result(block, f"messages[{number}].content[{at}]", turns)
        if not all(map(_is_result, blocks)):
            # An empty text for each result, so that the others keep their places.
            others = ["" if _is_result(block) else block for block in blocks]
            read_message({**item, "content": others}, "messages", number, turns)


def _is_result(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "tool_result"


def _add_result(block: Mapping[str, Any], key: str, turns: Turns) -> None:
    content = to_content(block.get("content"), f"$.{key}.content")
    identity = block.get("tool_use_id")
    message = Message(
        role="tool",
        content=content.text or "",  # a tool that says nothing
        tool_call_id=identity if isinstance(identity, str) else None,
    )
    turns.add(message, key, -1, block)


def _tool(tool: Any) -> Any:
    """A tool with `input_schema` as templates expect it; any other as it is."""
    if not isinstance(tool, dict) or "input_schema" not in tool:
        return tool
    function = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


ANTHROPIC = Format(
    name="anthropic",
    fields=OPENAI.fields,
    holds=OPENAI.holds,
    evidence=_evidence,
    convert=_convert,
    tool=_tool,
)
