"""`text` that is ChatML already: taken apart into its turns, or refused where it is not ChatML as a whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dft_prep.reconcile.converters import OPENAI_ROLES, RecordError, to_role, to_text
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.turns import Turns

_TURN = re.compile(r"\s*<\|im_start\|>(?P<role>[^\r\n<]*)\r?\n(?P<content>.*?)<\|im_end\|>", re.DOTALL)
_START = "<|im_start|>"


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    text = to_text(record.get("text"), "$.text")
    roles = turns.known(OPENAI_ROLES)
    at = 0
    while (found := _TURN.match(text, at)) is not None:
        if _START in found["content"]:
            raise _not_whole(text, found.start("content"))
        turns.add_text(to_role(found["role"], roles, "$.text"), found["content"], "text")
        at = found.end()
    if text[at:].strip() or not at:
        raise _not_whole(text, at)


def _not_whole(text: str, at: int) -> RecordError:
    found = f"not ChatML from character {at + 1} on: {text[at : at + 30]!r}"
    return RecordError("unknown_shape", "$.text", found, "end every turn with <|im_end|>, or write messages")


CHATML_TEXT = Format(
    name="chatml_text",
    fields={"text": "messages[].content"},
    holds=(("text",),),
    evidence=lambda record: isinstance(text := record.get("text"), str) and _START in text,
    convert=_convert,
)
