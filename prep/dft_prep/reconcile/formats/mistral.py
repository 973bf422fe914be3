"""`messages` in Mistral's function format: `available_tools`, and tools' results that may be objects.

Otherwise as OpenAI's; a result that is an object becomes compact JSON text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.reconcile.converters import compact_json
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.openai import OPENAI
from dft_prep.reconcile.formats.turns import Turns, listed, read_message


def _is_result(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("tool", "function")
        and isinstance(message.get("content"), dict)
    )


def _evidence(record: Mapping[str, Any]) -> bool:
    messages = record.get("messages")
    if not isinstance(messages, list):
        return False
    return record.get("available_tools") is not None or any(map(_is_result, messages))


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    for number, item in enumerate(listed(record.get("messages"), "messages")):
        if _is_result(item):
            item = {**item, "content": compact_json(item["content"], f"$.messages[{number}].content")}
        read_message(item, "messages", number, turns)


MISTRAL = Format(
    name="mistral",
    fields=OPENAI.fields,
    holds=OPENAI.holds,
    evidence=_evidence,
    convert=_convert,
)
