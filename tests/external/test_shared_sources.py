"""Real files of every shape, read where they lie beside the repository; skipped where they are absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dft_prep.judge.judgement import Judge, Judged
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import plan_units

SOURCES = Path(__file__).resolve().parents[3] / "shared" / "sources"
FILES = sorted(path for path in SOURCES.glob("*.json*") if path.is_file()) if SOURCES.is_dir() else []

pytestmark = pytest.mark.skipif(not FILES, reason="there are no shared sources")


def records(path: Path) -> list[dict[str, Any]]:
    """The file's records by the standard library, whole."""
    text = path.read_text("utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]


def texts(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", part.get("value")) for part in content if part["type"] == "text")
    return content


def replies(record: dict[str, Any]) -> list[str]:
    """The assistant's texts, found without our code."""
    if "messages" in record:
        return [texts(turn["content"]) for turn in record["messages"] if turn["role"] == "assistant"]
    if "conversations" in record:
        return [turn["value"] for turn in record["conversations"] if turn["from"] in ("gpt", "function_call")]
    return [record.get("output", record.get("response"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_record_is_taken_with_each_reply_verbatim(path):
    (source,) = resolve_sources([str(path)])
    raws = [raw for unit in plan_units(source.files[0], source.name) for raw in UnitReader(unit)]
    expected = records(path)
    assert len(raws) == len(expected) > 40
    data = path.read_bytes()
    for raw, record in zip(raws, expected, strict=True):
        assert isinstance(raw.data, bytes)
        assert data[raw.byte_offset :].startswith(raw.data)
        judged = Judge(path.name)(raw)
        assert isinstance(judged, Judged), judged
        said = [
            message.content if message.content is not None else message.tool_calls[0].verbatim if text else ""
            for message, text in zip(
                (each for each in judged.conversation.messages if each.role == "assistant"),
                replies(record),
                strict=True,
            )
        ]
        assert said == replies(record)
