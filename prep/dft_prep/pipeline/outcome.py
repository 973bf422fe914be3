"""What the manifest says of a build: its recipe, its sources, its counts.

Called by `build`. Nothing here differs between two builds of the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from dft_common import __version__
from dft_common.fingerprint import hash_object
from dft_common.manifest import (
    Counts,
    FileInfo,
    Manifest,
    SourceInfo,
    TemplateInfo,
    TokenizerInfo,
    rows_fingerprint,
)
from dft_common.schema import FORMAT_VERSION
from dft_prep.pipeline.assemble import Assembled
from dft_prep.pipeline.work import UnitResult
from dft_prep.recipe import Recipe
from dft_prep.reconcile.fields import field_uses
from dft_prep.reconcile.reconciliation import SourceFields, source_fields, unused_fields
from dft_prep.sources.named import Source
from dft_prep.sources.units import Unit

_LIBRARIES = ("tokenizers", "fastokens", "jinja2", "msgspec", "pyarrow", "numpy")


class PlannedUnit(msgspec.Struct, frozen=True, kw_only=True):
    """A work unit, and the numbers of its source and of its file within the source."""

    unit: Unit
    source: int
    file: int


class Learnt(msgspec.Struct, frozen=True, kw_only=True):
    """What the self-checks at the start found."""

    encoder: str
    template: TemplateInfo


def total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sum of several counts by reason."""
    added: Counter[str] = Counter()
    for count in counts:
        added.update(count)
    return added


def describe(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Any]:
    return recipe.describe(
        [
            {
                "name": source.name,
                "split": source.split,
                "max_conversations": source.max_conversations,
                "format": source.reading.format,
                "fields": dict(source.reading.fields),
                "roles": dict(source.reading.roles),
            }
            for source in sources
        ]
    )


def what_changed(manifest: Manifest, described: dict[str, Any], recipe: Recipe) -> str:
    changed = [key for key, value in described.items() if manifest.recipe.get(key) != value]
    if manifest.tokenizer.fingerprint != recipe.tokenizer.fingerprint():
        changed.append("tokenizer")
    return ("other " + ", ".join(sorted(changed))) if changed else "the source files have changed"


def recipe_fingerprint(
    recipe: Recipe, sources: Sequence[Source], planned: Sequence[PlannedUnit], fingerprints: Sequence[str]
) -> str:
    files = [
        (plan.source, sources[plan.source].files[plan.file].relative, fingerprint)
        for plan, fingerprint in zip(planned, fingerprints, strict=True)
    ]
    return hash_object([describe(recipe, sources), recipe.encoding_key(), files, FORMAT_VERSION])


def make_manifest(
    recipe: Recipe,
    sources: Sequence[Source],
    planned: Sequence[PlannedUnit],
    results: Sequence[UnitResult],
    learnt: Learnt,
    reconciled: Sequence[SourceFields],
    assembled: Assembled,
) -> Manifest:
    tokenizer = recipe.tokenizer
    named = tokenizer.named_tokens()
    infos = [result.info for result in results]
    return Manifest(
        format_version=FORMAT_VERSION,
        toolkit_version=__version__,
        libraries={name: version(name) for name in _LIBRARIES},
        recipe=describe(recipe, sources),
        recipe_fingerprint=recipe_fingerprint(recipe, sources, planned, [result.fingerprint for result in results]),
        fingerprint=rows_fingerprint(assembled.splits),
        token_dtype=recipe.options.token_dtype,
        encoder=learnt.encoder,
        tokenizer=TokenizerInfo(
            fingerprint=tokenizer.fingerprint(),
            vocab_size=tokenizer.vocab_size(),
            eos_token=named.get("eos_token"),
            pad_token=named.get("pad_token"),
            added_tokens=list(tokenizer.added),
        ),
        template=learnt.template,
        sources=[
            _source_info(number, source, planned, results, assembled.counts[number], unused_fields(reconciled[number]))
            for number, source in enumerate(sources)
        ],
        counts=_sum_counts(assembled.counts),
        warnings=dict(sorted(total(info.notes for info in infos).items())),
        splits=assembled.splits,
    )


def reconcile_sources(
    sources: Sequence[Source], planned: Sequence[PlannedUnit], results: Sequence[UnitResult]
) -> list[SourceFields]:
    """What the fields of each source became."""
    counts: list[list[list[tuple[str, str, str, int]]]] = [[] for _ in sources]
    for plan, result in zip(planned, results, strict=True):
        counts[plan.source].append(result.info.fields)
    return [
        source_fields(source.name, field_uses(mine, source.reading))
        for source, mine in zip(sources, counts, strict=True)
    ]


def _source_info(
    number: int,
    source: Source,
    planned: Sequence[PlannedUnit],
    results: Sequence[UnitResult],
    counts: Counts,
    unused: dict[str, int],
) -> SourceInfo:
    mine = [(plan, result) for plan, result in zip(planned, results, strict=True) if plan.source == number]
    files = []
    for at, file in enumerate(source.files):
        hashes = [result.fingerprint for plan, result in mine if plan.file == at]
        info = FileInfo(path=file.relative, size=file.size, units=len(hashes), checksum=hash_object(hashes))
        files.append(info)
    return SourceInfo(name=source.name, files=files, counts=counts, ignored_fields=unused)


def _sum_counts(counts: Sequence[Counts]) -> Counts:
    summed = Counts(left_out=dict(total(count.left_out for count in counts)))
    for count in counts:
        for name in ("read", "kept", "rows", "duplicates", "tokens", "trained_tokens"):
            setattr(summed, name, getattr(summed, name) + getattr(count, name))
    return summed


def assert_counts(counts: Counts) -> None:
    assert counts.read == counts.kept + sum(counts.left_out.values()) + counts.duplicates, counts
