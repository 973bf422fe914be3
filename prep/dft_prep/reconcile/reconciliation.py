"""The reconciliation report: what each source's fields became, and where sources disagree.

Made by `validate.command` for its summary and by `outcome` for a build's manifest, summary and report.json.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from dft_prep.reconcile.fields import FieldUse

_NULL = "null"
_NAMES_SHOWN = 5


class SourceFields(msgspec.Struct, frozen=True, kw_only=True):
    """The good records of one source."""

    name: str
    formats: dict[str, int]
    """Records of each format: the evidence for what the source is."""
    fields: list[FieldUse]


def source_fields(name: str, uses: Sequence[FieldUse]) -> SourceFields:
    return SourceFields(
        name=name,
        formats={use.format: use.records for use in uses if not use.path},
        fields=[use for use in uses if use.path],
    )


def unused_fields(source: SourceFields) -> dict[str, int]:
    """How often each field that is not used is there (and not null), by its path."""
    unused: Counter[str] = Counter()
    for use in source.fields:
        if use.target is None and use.type != _NULL:
            unused[use.path] += use.records
    return dict(sorted(unused.items()))


def disagreements(sources: Sequence[SourceFields]) -> list[str]:
    """Fields that have one type in some sources and another in others, each as one clause."""
    types: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for source in sources:
        for use in source.fields:
            if use.type != _NULL and source.name not in types[use.path][use.type]:
                types[use.path][use.type].append(source.name)
    return [
        f"`{path}` is " + ", ".join(f"{kind} in {' and '.join(names)}" for kind, names in sorted(kinds.items()))
        for path, kinds in sorted(types.items())
        if len(kinds) > 1
    ]


def reading_lines(sources: Sequence[SourceFields]) -> list[str]:
    """How each source was read, and where sources disagree, for a reader."""
    alike: dict[tuple[str, str], list[SourceFields]] = defaultdict(list)
    for source in sources:
        if total := sum(source.formats.values()):
            formats = ", ".join(f"{name} {100 * number / total:.4g} %" for name, number in source.formats.items())
            alike[formats, _mapped(source)].append(source)
    lines = []
    for (formats, mapped), found in alike.items():
        total = sum(number for source in found for number in source.formats.values())
        lines.append(f"  {_names(found)} {formats} of {total:,} records{mapped}")
    return lines + [f"  types differ: {clause}" for clause in disagreements(sources)]


def _names(sources: Sequence[SourceFields]) -> str:
    """`a is`, or `a, b, c and 4 more are`: those that were read alike share a line."""
    names = [source.name for source in sources]
    if len(names) == 1:
        return f"{names[0]} is"
    more = len(names) - _NAMES_SHOWN
    if more > 0:
        return f"{', '.join(names[:_NAMES_SHOWN])} and {more} more are"
    return f"{', '.join(names[:-1])} and {names[-1]} are"


def unused_line(name: str, fields: Mapping[str, int]) -> str:
    shown = ", ".join(f"{path} {number:,}" for path, number in fields.items())
    return f"  fields of {name} that are not used: {shown}"


def _mapped(source: SourceFields) -> str:
    """What became of the fields that are not called as in the canonical conversation."""
    fields = source.fields
    mapped = sorted({(use.path, use.target) for use in fields if use.target is not None and use.target != use.path})
    return ": " + ", ".join(f"{path} -> {target}" for path, target in mapped) if mapped else ""
