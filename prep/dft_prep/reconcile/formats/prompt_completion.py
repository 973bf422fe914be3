"""A question and its reply: `prompt` and `completion`, as texts or as lists of messages, and fields of other names.

Any of `prompt`, `question`, `input` with any of `completion`, `response`, `answer`, `output`, with `history`; two
questions or two replies in one record are ambiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.reconcile.converters import to_text
from dft_prep.reconcile.formats.dialogue import is_dialogue_before_reply, read_dialogue
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.turns import (
    SHAREGPT_FIELDS,
    Turns,
    read_history,
    read_messages,
    required_reply,
    the_one,
)

QUESTIONS = ("prompt", "question", "input")
REPLIES = ("completion", "response", "answer", "output")


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    question, reply = the_one(record, QUESTIONS, turns), the_one(record, REPLIES, turns)
    read_history(record.get("history") or [], turns)
    read_prompt(record.get(question), question, turns)
    if isinstance(record.get(reply), list):
        read_messages(record[reply], reply, turns)
    else:
        turns.add_text("assistant", required_reply(record, (reply,), turns)[1], reply)


def read_prompt(value: Any, key: str, turns: Turns) -> None:
    """Add a prompt: a user's text, a dialogue that ends where the assistant is to speak, or messages."""
    if isinstance(value, list):
        read_messages(value, key, turns)
    elif isinstance(value, str) and is_dialogue_before_reply(value):
        read_dialogue(value, key, turns, before_reply=True)
    else:
        turns.add_text("user", to_text(value, f"$.{key}"), key)


def _there(record: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    return any(record.get(key) is not None for key in keys)


PROMPT_COMPLETION = Format(
    name="prompt_completion",
    fields={
        **dict.fromkeys((*QUESTIONS, *REPLIES), "messages[].content"),
        "history": "messages",
        **{
            f"{key}[].{field}": f"messages[].{target}"
            for key in (*QUESTIONS, *REPLIES)
            for field, target in SHAREGPT_FIELDS.items()
        },
    },
    holds=(QUESTIONS, REPLIES),
    # An instruction makes it Alpaca's: its `input` is no question of its own.
    evidence=lambda record: _there(record, QUESTIONS) and _there(record, REPLIES) and record.get("instruction") is None,
    convert=_convert,
)
