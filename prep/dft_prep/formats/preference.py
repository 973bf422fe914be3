"""`chosen` and `rejected`: preference data, of which the chosen conversation is taken.

`chosen` is a list of messages (whole, or what follows a `prompt`), a reply to `prompt`, or a dialogue written as
"\\n\\nHuman: ...\\n\\nAssistant: ..." text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dft_prep.converters import RecordError, to_text
from dft_prep.formats.format import Format
from dft_prep.formats.prompt_completion import read_prompt
from dft_prep.formats.turns import Turns, read_messages

_SPEAKER = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n|$))")


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    chosen, prompt = record.get("chosen"), record.get("prompt")
    if isinstance(chosen, list):
        if prompt is not None and not _begins_with_a_question(chosen):
            read_prompt(prompt, "prompt", turns)
        read_messages(chosen, "chosen", turns)
        return
    text = to_text(chosen, "$.chosen")
    if prompt is not None:
        read_prompt(prompt, "prompt", turns)
        turns.add_text("assistant", text, "chosen")
    else:
        _read_dialogue(text, turns)


def _begins_with_a_question(chosen: list[Any]) -> bool:
    """Whether a list of messages is a whole conversation, and not only what follows a prompt."""
    first = chosen[0] if chosen else None
    return isinstance(first, dict) and first.get("role", first.get("from")) not in ("assistant", "gpt")


def _read_dialogue(text: str, turns: Turns) -> None:
    speakers = list(_SPEAKER.finditer(text))
    if not speakers or speakers[0].start() != 0:
        message = "a text without `prompt`, which does not begin with a blank line and `Human:`"
        raise RecordError("unknown_shape", "$.chosen", message, "give the prompt in a field of its own, or messages")
    ends = [*(found.start() for found in speakers[1:]), len(text)]
    for found, end in zip(speakers, ends, strict=True):
        turns.add_text("user" if found[1] == "Human" else "assistant", text[found.end() : end], "chosen")


PREFERENCE = Format(
    name="preference",
    fields={
        "prompt": "messages[].content",
        "chosen": "messages[].content",
        **{f"{key}[].role": "messages[].role" for key in ("prompt", "chosen")},
        **{f"{key}[].content": "messages[].content" for key in ("prompt", "chosen")},
    },
    evidence=lambda record: record.get("chosen") is not None,
    convert=_convert,
)
