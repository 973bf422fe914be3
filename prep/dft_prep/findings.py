"""Findings as text, JSON, or annotations of a GitHub workflow.

Called by `validate_command`. Data is untrusted: what it holds never reaches a terminal raw.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from dft_common.errors import printable
from dft_common.manifest import encode_json
from dft_common.records import Finding


class Summary(msgspec.Struct, kw_only=True):
    """What a validation counted. `good` records are those that a build would take."""

    records: int = 0
    good: int = 0
    codes: dict[str, int] = {}
    severities: dict[str, int] = {}
    unused_fields: dict[str, dict[str, int]] = {}
    """By source."""
    tokens: dict[str, int] = {}
    """With a tokenizer: total, trained, longest."""

    def count(self, finding: Finding) -> None:
        self.codes[finding.code] = self.codes.get(finding.code, 0) + 1
        self.severities[finding.severity] = self.severities.get(finding.severity, 0) + 1

    def count_fields(self, source: str, fields: tuple[str, ...]) -> None:
        if fields:
            counts = Counter(self.unused_fields.get(source, {}))
            counts.update(fields)
            self.unused_fields[source] = dict(counts)


def as_text(finding: Finding) -> str:
    """`file:line:column: CODE message (path)`, and what to do on a line of its own."""
    mark = "" if finding.severity == "error" else f"{finding.severity}: "
    head = f"{finding.file}:{finding.line}:{finding.column}: {mark}{finding.code} {finding.path}: {finding.message}"
    return printable(head.replace("\n", "\\n")) + (f"\n    {printable(finding.help)}" if finding.help else "")


def _escape_annotation(text: str, *, in_property: bool) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if in_property else text


def as_github(finding: Finding) -> str:
    """`::error file=...,line=...,col=...,title=CODE::message`."""
    level = {"error": "error", "warning": "warning", "info": "notice"}[finding.severity]
    file, title = (_escape_annotation(text, in_property=True) for text in (finding.file, finding.code))
    message = _escape_annotation(f"{finding.path}: {finding.message}. {finding.help}", in_property=False)
    return printable(f"::{level} file={file},line={finding.line},col={finding.column},title={title}::{message}")


def as_json(findings: list[Finding], summary: Summary) -> str:
    value: dict[str, Any] = {
        "findings": [msgspec.structs.asdict(finding) for finding in findings],
        "summary": msgspec.structs.asdict(summary),
    }
    return encode_json(value).decode()


def summary_text(summary: Summary) -> str:
    """The counts, for a reader."""
    lines = [f"{summary.records:,} records, {summary.good:,} good"]
    lines += [f"  {number:,} x {code}" for code, number in sorted(summary.codes.items(), key=lambda item: -item[1])]
    for source, fields in summary.unused_fields.items():
        shown = ", ".join(f"{field} {number:,}" for field, number in fields.items())
        lines.append(f"  fields of {source} that are not used: {shown}")
    if summary.tokens:
        lines.append("  tokens: " + ", ".join(f"{name} {number:,}" for name, number in summary.tokens.items()))
    return printable("\n".join(lines))
