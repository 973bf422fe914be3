"""A dialogue that is one text, "\\n\\nHuman: ...\\n\\nAssistant: ...", as Anthropic's preference data has it.

Called by `preference` for a whole dialogue, and for prompts that are all of one but the last reply.
"""

from __future__ import annotations

import re

from dft_prep.reconcile.formats.turns import Turns

_SPEAKER = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n|\Z))")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: str) -> bool:
    return _SPEAKER.match(text) is not None


def is_dialogue_before_reply(text: str) -> bool:
    """Whether `text` is a dialogue that ends where the assistant is to speak."""
    return is_dialogue(text) and text.rstrip(" ").endswith("\n\nAssistant:")


def read_dialogue(text: str, key: str, turns: Turns, *, before_reply: bool = False) -> None:
    """Add the turns of a dialogue, which stands in the field `key`. before_reply: the last of them is yet to come."""
    speakers = list(_SPEAKER.finditer(text))
    ends = [*(found.start() for found in speakers[1:]), len(text)]
    said = [(_ROLES[found[1]], text[found.end() : end]) for found, end in zip(speakers, ends, strict=True)]
    for role, content in said[:-1] if before_reply else said:
        turns.add_text(role, content, key)
