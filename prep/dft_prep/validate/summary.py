"""What a validation counted, for its end on stderr and for `--format json`.

Filled by `validate.command`, shown by `writers`.
"""

from __future__ import annotations

import msgspec

from dft_common.errors import log_safe
from dft_prep.reconcile.reconciliation import SourceFields, reading_lines, unused_fields, unused_line


class Summary(msgspec.Struct, kw_only=True):
    """`good` records are those that a build would take."""

    files: list[str] = []
    records: int = 0
    good: int = 0
    codes: dict[str, int] = {}
    """Every finding, shown or not; those of the baseline apart."""
    severities: dict[str, int] = {}
    known: int = 0
    """Findings that the baseline lets through."""
    hidden: int = 0
    """Errors and warnings that were not shown (--max_errors)."""
    fingerprints: list[str] = []
    """Of the findings that were shown, in order: what a baseline holds."""
    tokens: dict[str, int] = {}
    """With a tokenizer: total, trained, longest."""
    sources: list[SourceFields] = []

    def count(self, code: str, severity: str, times: int) -> None:
        if times:
            self.codes[code] = self.codes.get(code, 0) + times
            self.severities[severity] = self.severities.get(severity, 0) + times


def summary_text(summary: Summary) -> str:
    """The counts, for a reader."""
    lines = [f"{summary.records:,} records, {summary.good:,} good"]
    lines += [f"  {number:,} x {code}" for code, number in sorted(summary.codes.items(), key=lambda item: -item[1])]
    lines += reading_lines(summary.sources)
    lines += [unused_line(source.name, fields) for source in summary.sources if (fields := unused_fields(source))]
    if summary.tokens:
        lines.append("  tokens: " + ", ".join(f"{name} {number:,}" for name, number in summary.tokens.items()))
    if summary.known:
        lines.append(f"  {summary.known:,} known findings are let through (--baseline)")
    if summary.hidden:
        lines.append(f"  {summary.hidden:,} more findings are not shown (--max_errors)")
    return log_safe("\n".join(lines))
