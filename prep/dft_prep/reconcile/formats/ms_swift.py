"""`query`, `response`, `history`: ms-swift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.reconcile.converters import to_text
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.turns import Turns, read_history, required_reply


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    read_history(record.get("history") or [], turns)
    turns.add_text("user", to_text(record.get("query"), "$.query"), "query")
    key, reply = required_reply(record, ("response",), turns)
    turns.add_text("assistant", reply, key)


MS_SWIFT = Format(
    name="ms_swift",
    fields={"query": "messages[].content", "response": "messages[].content", "history": "messages"},
    holds=(("query",), ("response",)),
    evidence=lambda record: record.get("query") is not None,
    convert=_convert,
)
