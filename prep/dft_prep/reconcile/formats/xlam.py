"""`query`, `answers`, `tools`: xLAM's function calls, where the reply is a list of calls, often as JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dft_common.records import Message
from dft_prep.reconcile.converters import RecordError, to_text, to_tool_calls
from dft_prep.reconcile.formats.format import Format
from dft_prep.reconcile.formats.turns import Turns


def _convert(record: Mapping[str, Any], turns: Turns) -> None:
    turns.add_text("user", to_text(record.get("query"), "$.query"), "query")
    calls = to_tool_calls(record.get("answers"), "$.answers")
    if not calls:
        raise RecordError("null_content", "$.answers", "there is no call", "leave the record out")
    turns.add(Message(role="assistant", content=None, tool_calls=calls), "answers", -1, None)


def _evidence(record: Mapping[str, Any]) -> bool:
    # Answers that are texts, as of MS MARCO, are no calls.
    answers = record.get("answers")
    calls = answers.lstrip().startswith("[") if isinstance(answers, str) else _are_objects(answers)
    return record.get("query") is not None and calls


def _are_objects(answers: Any) -> bool:
    return isinstance(answers, list) and bool(answers) and all(isinstance(answer, dict) for answer in answers)


XLAM = Format(
    name="xlam",
    fields={"query": "messages[].content", "answers": "messages[].tool_calls"},
    holds=(("query",), ("answers",)),
    evidence=_evidence,
    convert=_convert,
)
