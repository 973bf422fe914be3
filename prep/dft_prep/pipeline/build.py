"""`dft-prep build`: the whole of preparation, in order. Read this file first.

Called by `cli`. Sources are cut into work units; each unit becomes a part; the parts become shards, then a
pack index; the manifest is written last, and makes the dataset complete.
"""

from __future__ import annotations

import datetime
import errno
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from dft_common.errors import DataError, SetupError
from dft_common.logs import get_logger
from dft_common.manifest import Manifest, read_manifest
from dft_common.packs import PackIndexInfo
from dft_common.records import Finding
from dft_common.schema import MANIFEST_NAME, PACKS_DIR, QUARANTINE_NAME, SPLITS, TOKENIZER_DIR
from dft_prep.encode.batch import BatchEncoder
from dft_prep.encode.encoders import EncoderMismatch, ReferenceEncoder
from dft_prep.pipeline.assemble import AssembleOptions, PartOfSource, assemble
from dft_prep.pipeline.engine import default_workers, fingerprint_units, run_units
from dft_prep.pipeline.learn import learn, sample
from dft_prep.pipeline.outcome import (
    Learnt,
    PlannedUnit,
    assert_counts,
    describe,
    make_manifest,
    recipe_fingerprint,
    reconcile_sources,
    total,
    what_changed,
)
from dft_prep.pipeline.progress import Progress
from dft_prep.pipeline.report import print_summary, write_report
from dft_prep.pipeline.stops import stop_warnings
from dft_prep.pipeline.work import (
    EncodeJob,
    Progressed,
    UnitResult,
    Worker,
    part_path,
    part_quarantine_path,
    work_context,
)
from dft_prep.pipeline.workspace import Workspace
from dft_prep.recipe import BuildOptions, Recipe, make_recipe, parse_date
from dft_prep.shards.pack import PackOptions, pack_split
from dft_prep.sources.named import Source, resolve_sources
from dft_prep.sources.units import Unit, lines_before, plan_units


def build(options: BuildOptions) -> Path:
    """Build the dataset, or find it up to date. Returns its directory; raises DataError or SetupError."""
    started = time.monotonic()
    sources = resolve_sources(options.data_files)
    output_dir = Path(options.output_dir)
    workspace = Workspace(output_dir)
    workspace.open(resume=options.resume)
    try:
        existing = _existing(options, output_dir)
        recipe = make_recipe(options, _date(options, existing, workspace))
        planned = [
            PlannedUnit(unit=unit, source=number, file=at)
            for number, source in enumerate(sources)
            for at, file in enumerate(source.files)
            for unit in plan_units(file, source.name, source.reading)
        ]
        workers = options.preprocessing_num_workers or default_workers()
        if existing is not None and _up_to_date(recipe, sources, planned, existing, workers):
            get_logger().info("%s is up to date", output_dir)
            return output_dir
        _build(recipe, sources, planned, workspace, workers, started)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError(
                f"{output_dir}: the disk is full",
                remedy="free some space and run the same command again: it goes on from what it finished",
            ) from None
        raise
    finally:
        workspace.close()
    return output_dir


def _build(
    recipe: Recipe,
    sources: Sequence[Source],
    planned: Sequence[PlannedUnit],
    workspace: Workspace,
    workers: int,
    started: float,
) -> None:
    options = recipe.options
    learnt, results = _encode(recipe, sources, planned, workspace, workers)
    parts = [
        PartOfSource(path=part_path(workspace.parts, result.key), source=plan.source, info=result.info)
        for plan, result in zip(planned, results, strict=True)
    ]
    _write_quarantine(workspace, planned, results)
    _refuse_bad_sources(sources, parts, options, workspace)
    assembled = assemble(sources, parts, workspace.new, _assemble_options(recipe))
    reconciled = reconcile_sources(sources, planned, results)
    manifest = make_manifest(recipe, sources, planned, results, learnt, reconciled, assembled)
    assert_counts(manifest.counts)
    pack_options = PackOptions(
        max_length=options.max_length, overlong=options.overlong, packing=options.packing, seed=options.seed
    )
    indexes = [
        pack_split(
            workspace.new / split, manifest.splits[split], workspace.new / PACKS_DIR, pack_options, manifest.fingerprint
        )
        for split in SPLITS
    ]
    recipe.tokenizer.save(workspace.new / TOKENIZER_DIR, recipe.template.source)
    seconds = time.monotonic() - started
    resumed = _found_finished(results, workspace)
    write_report(workspace.new, manifest, indexes, reconciled, seconds=seconds, workers=workers, units_found=resumed)
    workspace.publish(manifest)
    print_summary(workspace.output_dir, manifest, indexes, reconciled, seconds)
    _warn(recipe, learnt, indexes)


def _existing(options: BuildOptions, output_dir: Path) -> Manifest | None:
    """The manifest of a complete dataset in OUT. One that cannot be read is in the way only without --overwrite."""
    if not (output_dir / MANIFEST_NAME).exists():
        return None
    try:
        return read_manifest(output_dir)
    except DataError as error:
        if options.overwrite:
            return None
        raise DataError(error.message, remedy="give another directory, or --overwrite True to build it anew") from None


def _date(options: BuildOptions, existing: Manifest | None, workspace: Workspace) -> datetime.date:
    """What strftime_now prints: as given, else as in the dataset that is there, else the day of the first start."""
    if options.template_date is not None:
        return parse_date(options.template_date)
    if existing is not None and "template_date" in existing.recipe:
        return parse_date(existing.recipe["template_date"])
    return parse_date(workspace.first_start(datetime.date.today().isoformat()))


def _up_to_date(
    recipe: Recipe, sources: Sequence[Source], planned: Sequence[PlannedUnit], manifest: Manifest, workers: int
) -> bool:
    """Whether `manifest` is of what this build would make. Raises SetupError where it is not, and may not go."""
    fingerprints = fingerprint_units([plan.unit for plan in planned], workers)
    if manifest.recipe_fingerprint == recipe_fingerprint(recipe, sources, planned, fingerprints):
        return True
    if not recipe.options.overwrite:
        changed = what_changed(manifest, describe(recipe, sources), recipe)
        raise SetupError(
            f"--output_dir {recipe.options.output_dir}: holds a complete dataset of another recipe ({changed})",
            remedy="give another directory, or --overwrite True to replace it",
        )
    return False


def _encode(
    recipe: Recipe, sources: Sequence[Source], planned: Sequence[PlannedUnit], workspace: Workspace, workers: int
) -> tuple[Learnt, list[UnitResult]]:
    conversations = sample([plan.unit for plan in planned])
    wanted = recipe.options.encoder
    while True:
        encoder, template = learn(recipe, conversations, wanted)
        try:
            learnt = Learnt(encoder=encoder.encoder.name, template=template)
            return learnt, _run(recipe, planned, encoder, workspace, workers)
        except EncoderMismatch:
            wanted = ReferenceEncoder.name
            get_logger().warning("fastokens gave other ids than tokenizers here; all is encoded again without it")


def _run(
    recipe: Recipe, planned: Sequence[PlannedUnit], encoder: BatchEncoder, workspace: Workspace, workers: int
) -> list[UnitResult]:
    context = work_context(recipe, encoder.encoder.name, workspace.parts)
    units = [plan.unit for plan in planned]
    results: dict[int, UnitResult] = {}
    stopped: dict[int, Finding] = {}
    told: dict[int, Progressed] = {}
    run = run_units(
        units,
        EncodeJob(context),
        workers,
        work=Worker(context, encoder).run,
        in_order=context.stop_at_first,
        enough=lambda: bool(stopped),
    )
    with Progress(sum(unit.size for unit in units)) as progress:
        for number, result in run:
            if isinstance(result, Finding):
                stopped[number] = result
                continue
            before, after = told.get(number, Progressed()), result
            if isinstance(result, UnitResult):
                results[number] = result
                after = Progressed(units[number].size, result.info.read, result.info.tokens)
            told[number] = after
            progress.advance(after.size - before.size, after.read - before.read, after.tokens - before.tokens)
    if stopped:
        first = min(stopped)
        raise _stopped_by(stopped[first], units[first])
    if found := _found_finished(results.values(), workspace):
        get_logger().info("going on: %d of %d work units were finished already", found, len(units))
    return [results[number] for number in range(len(units))]


def _stopped_by(finding: Finding, unit: Unit) -> DataError:
    line = finding.line + lines_before(unit)
    return DataError(
        f"{finding.file}:{line}:{finding.column}: {finding.code} {finding.path}: {finding.message} (--on_error stop)",
        remedy=f"{finding.help}, or use --on_error quarantine" if finding.help else "use --on_error quarantine",
    )


def _found_finished(results: Iterable[UnitResult], workspace: Workspace) -> int:
    """How many units an earlier build had finished."""
    return sum(result.key in workspace.finished_before for result in results)


def _write_quarantine(workspace: Workspace, planned: Sequence[PlannedUnit], results: Sequence[UnitResult]) -> None:
    """Every record left out, with the line number counted from its file's start."""
    with (workspace.new / QUARANTINE_NAME).open("wb") as out:
        lines_before: Counter[tuple[int, int]] = Counter()
        for plan, result in zip(planned, results, strict=True):
            offset = lines_before[plan.source, plan.file] if plan.unit.kind == "lines" else 0
            with part_quarantine_path(workspace.parts, result.key).open("rb") as lines:
                for line in lines:
                    entry = msgspec.json.decode(line)
                    entry["file"] = plan.unit.file.shown
                    entry["line"] += offset
                    out.write(msgspec.json.encode(entry) + b"\n")
            lines_before[plan.source, plan.file] += result.info.lines


def _refuse_bad_sources(
    sources: Sequence[Source], parts: Sequence[PartOfSource], options: BuildOptions, workspace: Workspace
) -> None:
    """Raise DataError where a source has more bad records than allowed, or nothing good at all."""
    kept = sum(part.info.kept for part in parts)
    for number, source in enumerate(sources):
        infos = [part.info for part in parts if part.source == number]
        read = sum(info.read for info in infos)
        reasons = total(info.left_out for info in infos)
        bad = sum(reasons.values()) - reasons["contaminated"]  # which is as the recipe wants it
        if bad > options.max_bad_records and bad > options.max_bad_fraction * read:
            limits = f"--max_bad_records {options.max_bad_records} and --max_bad_fraction {options.max_bad_fraction:g}"
            first = _first_bad(workspace, {file.shown for file in source.files})
            _keep_quarantine(workspace)
            raise DataError(
                f"source {source.name}: {bad:,} of {read:,} records are bad ({_reasons(reasons)}); "
                f"allowed are {limits}{first}",
                remedy=f"see {workspace.output_dir / QUARANTINE_NAME}, repair the data, or raise both limits",
            )
    if not kept:
        first = _first_bad(workspace, {file.shown for source in sources for file in source.files})
        _keep_quarantine(workspace)
        reasons = total(part.info.left_out for part in parts)
        raise DataError(
            f"nothing to build: no record was kept ({_reasons(reasons) or 'the files hold no records'}){first}",
            remedy=f"see {workspace.output_dir / QUARANTINE_NAME}, or check --data_files",
        )


def _first_bad(workspace: Workspace, files: set[str]) -> str:
    """The first bad record of these files, for an error's message."""
    with (workspace.new / QUARANTINE_NAME).open("rb") as lines:
        for line in lines:
            entry = msgspec.json.decode(line)
            if entry["file"] in files:
                place = f"{entry['file']}:{entry['line']}:{entry['column']}"
                return f"\n  the first: {place}: {entry['code']} {entry['path']}: {entry['message']}"
    return ""


def _keep_quarantine(workspace: Workspace) -> None:
    if not (workspace.output_dir / MANIFEST_NAME).exists():
        (workspace.new / QUARANTINE_NAME).replace(workspace.output_dir / QUARANTINE_NAME)


def _reasons(reasons: Counter[str]) -> str:
    return ", ".join(f"{code} {number:,}" for code, number in reasons.most_common())


def _assemble_options(recipe: Recipe) -> AssembleOptions:
    options = recipe.options
    return AssembleOptions(
        deduplicate=options.deduplicate,
        validation_split_percentage=options.validation_split_percentage,
        seed=options.seed,
        token_dtype=options.token_dtype,
        shard_bytes=recipe.shard_bytes,
    )


def _warn(recipe: Recipe, learnt: Learnt, indexes: Sequence[PackIndexInfo]) -> None:
    for warning in stop_warnings(recipe.tokenizer, learnt.template.end_of_turn):
        get_logger().warning("%s", warning)
    for index in indexes:
        for source, lost in index.lost.items():
            # Context alone that is cut off trains nothing: the summary counts it, nobody need act on it.
            if lost.trained_tokens:
                get_logger().warning(
                    "%s, source %s: %d conversations do not fit --max_length %d (--overlong %s). Tokens lost: %d, "
                    "trained tokens lost: %d. Raise --max_length%s",
                    index.split,
                    source,
                    lost.rows,
                    index.max_length,
                    index.overlong,
                    lost.tokens,
                    lost.trained_tokens,
                    "" if index.overlong == "split" else ", or choose --overlong split",
                )
