"""A question and its reply: `prompt` and `completion`, as texts or as lists of messages, and fields of other names.

Any of `prompt`, `question`, `input` with any of `completion`, `response`, `answer`, `output`; two questions or two
replies in one record are ambiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.converters import RecordError, to_text
from dft_prep.formats.format import Format
from dft_prep.formats.turns import Turns, read_messages, required_reply

QUESTIONS = ("prompt", "question", "input")
REPLIES = ("completion", "response", "answer", "output")


def _there(record: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if record.get(key) is not None]


def _the_one(record: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    found = _there(record, keys)
    filled = [key for key in found if record[key] not in ("", [])] or found
    if len(filled) > 1:
        shown = " and ".join(f"`{key}`" for key in filled)
        raise RecordError("ambiguous_shape", "$", f"{shown} may each be meant", "keep one, or map `fields` in a recipe")
    return (filled or list(keys))[0]


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    question, reply = _the_one(record, QUESTIONS), _the_one(record, REPLIES)
    read_prompt(record.get(question), question, turns)
    if isinstance(record.get(reply), list):
        read_messages(record[reply], reply, turns)
    else:
        turns.add_text("assistant", required_reply(record, (reply,))[1], reply)


def read_prompt(value: Any, key: str, turns: Turns) -> None:
    """Add a prompt: a user's text, or messages."""
    if isinstance(value, list):
        read_messages(value, key, turns)
    else:
        turns.add_text("user", to_text(value, f"$.{key}"), key)


PROMPT_COMPLETION = Format(
    name="prompt_completion",
    fields={
        **dict.fromkeys((*QUESTIONS, *REPLIES), "messages[].content"),
        **{
            f"{key}[].{field}": f"messages[].{field}"
            for key in ("prompt", "completion")
            for field in ("role", "content")
        },
    },
    # An instruction makes it Alpaca's: its `input` is no question of its own.
    evidence=lambda record: (
        bool(_there(record, QUESTIONS)) and bool(_there(record, REPLIES)) and record.get("instruction") is None
    ),
    convert=_convert,
)
