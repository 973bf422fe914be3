"""What a build says at its end, and report.json: times, machine, and whatever else is not the data.

Called by `build`. The summary goes to stderr; the manifest holds the same counts for programs.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dft_common.errors import printable
from dft_common.manifest import Counts, Manifest, encode_json
from dft_common.packs import PackIndexInfo
from dft_common.schema import QUARANTINE_NAME, REPORT_NAME
from dft_prep.codes.table import CODES
from dft_prep.pipeline.progress import duration
from dft_prep.reconcile.reconciliation import SourceFields, disagreements, reading_lines, unused_line


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _reasons(counts: Counts) -> str:
    return ", ".join(f"{code} {number:,}" for code, number in sorted(counts.left_out.items(), key=lambda kv: -kv[1]))


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  " + "  ".join([name.ljust(widths[0]), *cells]))
    return lines


def summary_lines(manifest: Manifest, indexes: Sequence[PackIndexInfo]) -> list[str]:
    """The counts by source, what was left out and why, the splits and packs, and the warnings."""
    rows = [["source", "read", "kept", "duplicates", "left out", "tokens", "trained"]]
    named = [(source.name, source.counts) for source in manifest.sources]
    for name, count in [*named, *([("total", manifest.counts)] if len(named) > 1 else [])]:
        left_out = sum(count.left_out.values())
        numbers = [count.read, count.kept, count.duplicates, left_out, count.tokens]
        rows.append([name, *(f"{number:,}" for number in numbers), _percent(count.trained_tokens, count.tokens)])
    lines = _table(rows)
    for name, count in named:
        if count.left_out:
            # What is beyond a source's own limit is no fault, and not copied to the quarantine.
            see = f" (see {QUARANTINE_NAME})" if set(count.left_out) - {"over_max_conversations"} else ""
            lines.append(f"  left out of {name}: {_reasons(count)}{see}")
    for source in manifest.sources:
        if source.ignored_fields:
            lines.append(unused_line(source.name, source.ignored_fields))
    for split, info in manifest.splits.items():
        index = next(index for index in indexes if index.split == split)
        lines.append(f"  {split}: {info.rows:,} conversations, {info.tokens:,} tokens, {_describe_packs(index)}")
        lines += _lost_lines(index)
    for name, number in manifest.warnings.items():
        lines.append(f"  note: {number:,} x {name}: {CODES[name].meaning} {CODES[name].remedy}")
    return lines


def describe_index(index: PackIndexInfo) -> str:
    """`12 packs of 8,192 (98.7 % full)`, the rows that no pack holds, and a line for each source that loses tokens."""
    return "\n".join([_describe_packs(index), *map(printable, _lost_lines(index))])


def _lost_lines(index: PackIndexInfo) -> list[str]:
    return [
        f"    lost of {source}: tokens {lost.tokens:,}, trained tokens {lost.trained_tokens:,} "
        f"(in {lost.rows:,} conversations)"
        for source, lost in index.lost.items()
    ]


def _describe_packs(index: PackIndexInfo) -> str:
    if not index.packs:
        return "no packs"
    fill = _percent(index.tokens, index.packs * index.max_length)
    text = f"{index.packs:,} packs of {index.max_length:,} ({fill} full)"
    if index.left_out:
        text += ", not packed: " + ", ".join(f"{reason} {number:,}" for reason, number in index.left_out.items())
    return text


def print_summary(
    output_dir: Path,
    manifest: Manifest,
    indexes: Sequence[PackIndexInfo],
    reconciled: Sequence[SourceFields],
    seconds: float,
) -> None:
    rate = manifest.counts.tokens / max(seconds, 1e-6)
    head = f"built {output_dir} in {duration(seconds)} ({rate:,.0f} tokens/s, encoder {manifest.encoder})"
    lines = [head, *summary_lines(manifest, indexes), *reading_lines(reconciled)]
    sys.stderr.write("\n".join(map(printable, lines)) + "\n")


def write_report(
    directory: Path,
    manifest: Manifest,
    indexes: Sequence[PackIndexInfo],
    reconciled: Sequence[SourceFields],
    *,
    seconds: float,
    workers: int,
    units_found: int,
) -> None:
    """report.json: the counts again, with what differs from one build to the next."""
    report = {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(manifest.counts.tokens / max(seconds, 1e-6)),
        "workers": workers,
        "work_units_found_finished": units_found,
        "host": platform.node(),
        "python": platform.python_version(),
        "encoder": manifest.encoder,
        "counts": msgspec.to_builtins(manifest.counts),
        "warnings": manifest.warnings,
        "reconciliation": {
            "sources": msgspec.to_builtins(list(reconciled)),
            "disagreements": disagreements(reconciled),
        },
        "packs": [msgspec.to_builtins(index) for index in indexes],
    }
    (directory / REPORT_NAME).write_bytes(encode_json(report))
