"""`instruction`, `input`, `output` (or `response`), with `history`: Alpaca.

The question is instruction and input, joined by one newline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.converters import RecordError, to_text
from dft_prep.formats.format import Format
from dft_prep.formats.turns import Turns, read_history, required_reply


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    read_history(record.get("history") or [], turns)
    instruction, extra = (
        to_text(record[key], f"$.{key}") if record.get(key) is not None else "" for key in ("instruction", "input")
    )
    if not instruction and not extra:
        raise RecordError("empty_conversation", "$.instruction", "instruction and input are empty", "leave it out")
    key, reply = required_reply(record, ("output", "response"))
    turns.add_text("user", "\n".join(text for text in (instruction, extra) if text), "instruction")
    turns.add_text("assistant", reply, key)


ALPACA = Format(
    name="alpaca",
    fields={
        "instruction": "messages[].content",
        "input": "messages[].content",
        "output": "messages[].content",
        "response": "messages[].content",
        "history": "messages",
    },
    evidence=lambda record: record.get("instruction") is not None,
    convert=_convert,
)
