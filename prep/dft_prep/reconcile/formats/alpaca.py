"""`instruction`, `input` (Dolly's `context`), `output` (or `response`), with `history`: Alpaca.

The question is instruction and input, joined by one newline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.reconcile.converters import RecordError, to_text
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.turns import Turns, read_history, required_reply, the_one

_MORE = ("input", "context")
_REPLIES = ("output", "response")


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    read_instruction(record, turns)
    key, reply = required_reply(record, _REPLIES, turns)
    turns.add_text("assistant", reply, key)


def read_instruction(record: Mapping[str, Any], turns: Turns) -> None:
    """Add all that comes before the reply."""
    read_history(record.get("history") or [], turns)
    more = the_one(record, _MORE, turns)
    instruction, extra = (
        to_text(record[key], f"$.{key}") if record.get(key) is not None else "" for key in ("instruction", more)
    )
    if not instruction and not extra:
        raise RecordError("empty_conversation", "$.instruction", f"instruction and {more} are empty", "leave it out")
    text = "\n".join(text for text in (instruction, extra) if text)
    turns.add_text("user", text, "instruction" if instruction else more)


def _evidence(record: Mapping[str, Any]) -> bool:
    # With `chosen` and no reply of its own it is a preference's prompt.
    return record.get("instruction") is not None and (
        record.get("chosen") is None or any(record.get(key) is not None for key in _REPLIES)
    )


ALPACA = Format(
    name="alpaca",
    fields={
        "instruction": "messages[].content",
        **dict.fromkeys(_MORE, "messages[].content"),
        "output": "messages[].content",
        "response": "messages[].content",
        "history": "messages",
    },
    holds=(("instruction", *_MORE), _REPLIES),
    evidence=_evidence,
    convert=_convert,
)
