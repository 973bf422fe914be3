"""What is odd about a conversation that can be read: the rules of the scope `rule` in `codes.CODES`.

Called by `validate` for every record. A rule only finds; how grave that is, the recipe says (`severities`).
"""

from __future__ import annotations

from typing import NamedTuple

from dft_common.records import Conversation


class Oddity(NamedTuple):
    """One finding about a conversation."""

    code: str
    message_index: int
    """Index of the message in `Conversation.messages`; -1: the conversation as a whole, or its tools."""
    part: str
    """`content`, `role`, `reasoning`, `tool_calls[1]`, `tool_call_id`, `tools[2]`, or nothing."""
    found: str
    """What was found, as one clause: `the reply is empty`."""
    help: str = ""
    """What to do, where that is more than the code's remedy."""


def find_oddities(conversation: Conversation, raw: bytes | None = None) -> list[Oddity]:
    """Every oddity, in the order of the messages. raw: the record's bytes, where it has any, for quick searches."""
    del raw
    found: list[Oddity] = []
    messages = conversation.messages
    if messages[-1].role != "assistant":
        role = messages[-1].role
        found.append(Oddity("no_reply_at_end", len(messages) - 1, "", f"ends with a {role} turn"))
    for number, message in enumerate(messages):
        empty = message.content == "" and not message.tool_calls and message.reasoning is None
        if message.role == "assistant" and empty:
            found.append(Oddity("empty_reply", number, "content", "the reply is empty"))
    return found
