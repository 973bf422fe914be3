"""`chosen` and `rejected`: preference data, of which the chosen conversation is taken.

`chosen` is a list of messages (whole, or what follows a prompt), one message, a text that replies to a prompt, or a
dialogue written as one text. The prompt is `prompt`, `question` or `input`, Alpaca's instruction, or a list of messages
that ends before the reply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.reconcile.converters import RecordError, to_text
from dft_prep.reconcile.formats.alpaca import read_instruction
from dft_prep.reconcile.formats.choices import is_only_prompt, is_reply
from dft_prep.reconcile.formats.dialogue import is_dialogue, read_dialogue
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.prompt_completion import QUESTIONS, read_prompt
from dft_prep.reconcile.formats.sharegpt import CONVERSATIONS, read_conversation
from dft_prep.reconcile.formats.turns import SHAREGPT_FIELDS, Turns, read_history, read_message, read_messages, the_one

_LISTS = ("messages", *CONVERSATIONS)


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    chosen = record.get("chosen")
    if isinstance(chosen, list):
        if not chosen or is_reply(chosen[0]):
            _read_prompt(record, turns)
        read_messages(chosen, "chosen", turns)
    elif isinstance(chosen, dict):
        _read_prompt(record, turns)
        read_message(chosen, "chosen", -1, turns)
    elif _read_prompt(record, turns):
        turns.add_text("assistant", to_text(chosen, "$.chosen"), "chosen")
    else:
        _read_whole(to_text(chosen, "$.chosen"), turns)


def _read_prompt(record: Mapping[str, Any], turns: Turns) -> bool:
    """Add what `chosen` replies to; whether there is anything."""
    keys = [key for key in ("prompt", "instruction", "question") if record.get(key) is not None]
    # Alpaca's input is a part of its instruction.
    if "instruction" not in keys and record.get("input") is not None:
        keys.append("input")
    keys += [key for key in _LISTS if record.get(key) is not None and is_only_prompt(record, key)]
    if not keys:
        return False
    key = the_one(record, keys, turns)
    if key == "instruction":
        read_instruction(record, turns)
    elif key in CONVERSATIONS:
        read_conversation(record, key, turns)
    else:
        read_history(record.get("history") or [], turns)
        read_prompt(record[key], key, turns)
    return True


def _read_whole(text: str, turns: Turns) -> None:
    if not is_dialogue(text):
        message = "a text without `prompt`, which does not begin with a blank line and `Human:`"
        raise RecordError("unknown_shape", "$.chosen", message, "give the prompt in a field of its own, or messages")
    read_dialogue(text, "chosen", turns)


PREFERENCE = Format(
    name="preference",
    fields={
        **dict.fromkeys((*QUESTIONS, "instruction", "chosen"), "messages[].content"),
        "history": "messages",
        **{
            f"{key}[].{field}": f"messages[].{target}"
            for key in ("prompt", "chosen", *_LISTS)
            for field, target in SHAREGPT_FIELDS.items()
        },
    },
    holds=(("chosen",),),
    evidence=lambda record: record.get("chosen") is not None,
    convert=_convert,
)
