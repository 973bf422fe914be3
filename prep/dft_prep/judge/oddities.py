"""Something odd about a conversation, as a record: made by `rules` and `tool_rules`, for `judgement` to judge."""

from __future__ import annotations

from typing import NamedTuple


class Oddity(NamedTuple):
    """One finding about a conversation."""

    code: str
    """One of the scope `rule` in `codes.CODES`."""
    message_index: int
    """Index of the message in `Conversation.messages`; -1: the conversation as a whole, or its tools."""
    part: str
    """`content`, `role`, `reasoning`, `tool_calls[1]`, `tool_call_id`, `tools[2]`, or nothing."""
    found: str
    """What was found, as one clause: `the reply is empty`."""
    help: str = ""
    """What to do, where that is more than the code's remedy."""
