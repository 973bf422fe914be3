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
        else:
            read_messages(chosen, "chosen", turns)
            _refuse_lost_prompt(record, turns)
    elif isinstance(chosen, dict):
        _read_prompt(record, turns)
        read_message(chosen, "chosen", -1, turns)
    elif isinstance(chosen, str) and is_dialogue(chosen):
        read_dialogue(chosen, "chosen", turns)
        _refuse_other_prompt(record, turns)
    elif _read_prompt(record, turns):
        turns.add_text("assistant", to_text(chosen, "$.chosen"), "chosen")
    else:
        to_text(chosen, "$.chosen")
        message = "a text without `prompt`, which does not begin with a blank line and `Human:`"
        raise RecordError("unknown_shape", "$.chosen", message, "give the prompt in a field of its own, or messages")


def _refuse_lost_prompt(record: Mapping[str, Any], turns: Turns) -> None:
    """Raise RecordError where a list of messages beside a whole conversation is not what that begins with."""
    for key in (*QUESTIONS, *_LISTS):
        if not isinstance(record.get(key), list) or not record[key] or is_reply(record[key][-1]):
            continue
        prompt = Turns(turns.roles, turns.named)
        try:
            read_messages(record[key], key, prompt, sharegpt=key in CONVERSATIONS)
        except RecordError:
            continue  # no messages: it is no second reading
        if prompt.messages != turns.messages[: len(prompt.messages)]:
            message = f"`chosen` is a whole conversation, and does not begin with the messages of `{key}`"
            raise RecordError("ambiguous_shape", "$.chosen", message, f"keep its reply alone, or leave `{key}` out")


def _refuse_other_prompt(record: Mapping[str, Any], turns: Turns) -> None:
    """Raise RecordError where a whole dialogue stands beside a prompt that is not what its last turn replies to."""
    prompt = Turns(turns.roles, turns.named)
    if not _read_prompt(record, prompt):
        return
    asked = [(message.role, (message.content or "").strip()) for message in prompt.messages]
    before = [(message.role, (message.content or "").strip()) for message in turns.messages[:-1]]
    if before[-len(asked) :] != asked:
        message = "`chosen` is a whole dialogue, and its last turn does not reply to the prompt beside it"
        raise RecordError("ambiguous_shape", "$.chosen", message, "keep its reply alone, or leave the prompt out")


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
