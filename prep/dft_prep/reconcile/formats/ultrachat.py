"""`data`: a list of texts that take turns, the user's first: UltraChat as it was first published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.turns import Turns, read_texts


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    read_texts(record.get("data"), "data", turns)


def _evidence(record: Mapping[str, Any]) -> bool:
    data = record.get("data")
    return isinstance(data, list) and bool(data) and all(isinstance(text, str) for text in data)


ULTRACHAT = Format(
    name="ultrachat",
    fields={"data": "messages[].content"},
    holds=(("data",),),
    evidence=_evidence,
    convert=_convert,
)
