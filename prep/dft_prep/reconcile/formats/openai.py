"""`messages`, as OpenAI's chat API and its fine-tuning files have them; and what else calls its list of messages so.

A message object may have `weight`, `tool_calls`, the older `function_call`, a content of parts, reasoning, a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.reconcile.formats.choices import is_only_prompt
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.turns import SHAREGPT_FIELDS, Turns, read_messages


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    read_messages(record.get("messages"), "messages", turns)


OPENAI = Format(
    name="openai",
    fields={f"messages[].{field}": f"messages[].{target}" for field, target in SHAREGPT_FIELDS.items()},
    holds=(("messages",),),
    evidence=lambda record: record.get("messages") is not None and not is_only_prompt(record, "messages"),
    convert=_convert,
)
