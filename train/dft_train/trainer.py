"""A training run from beginning to end, on one page. Called by `cli` with parsed settings.

1. the dataset: given, or built now (`bridge`); 2. refusals, before anything is slow (`checks`); 3. the plan
(`plan`); 4. the model (`models`); 5. training or evaluation (`loop`); 6. what is left behind (`checkpoints`).
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, NamedTuple

from dft_common import logs
from dft_common.errors import DataError
from dft_common.manifest import Manifest, encode_json, read_manifest, write_atomically
from dft_common.reader import SplitReader
from dft_common.schema import TRAIN
from dft_train.bridge import built_dataset
from dft_train.faults.out_of_memory import Situation, explained, look_at, predicted_ways
from dft_train.ranks import launch
from dft_train.ranks.signals import Signals, Stopped
from dft_train.ranks.start import follow_parent
from dft_train.ranks.watch import Ranks
from dft_train.settings import checks
from dft_train.settings.arguments import Settings
from dft_train.settings.deepspeed_checks import adopt

EVAL_RESULTS_NAME = "eval_results.json"


class _Data(NamedTuple):
    """A checked dataset, and the model's configuration that it was checked against."""

    directory: Path
    manifest: Manifest
    config: Any
    attention: str
    train: Any
    """PackedSplit, None for --eval_only."""
    evaluation: Any
    """PackedSplit, None where the split is empty."""


def _dataset(settings: Settings) -> contextlib.AbstractContextManager[Path]:
    if settings.dataset_dir is None:
        return built_dataset(settings)
    ignored = [f"--{name}" for name in settings.build if name not in ("max_length", "seed", "packing")]
    if ignored:
        launch.warn("%s only take part in a build: with --dataset_dir they change nothing", ", ".join(ignored))
    return contextlib.nullcontext(settings.dataset_dir)


def _check_sizes(directory: Path, manifest: Manifest) -> None:
    if logs.rank_and_world_size()[0] == 0:
        for split in manifest.splits:
            SplitReader(directory, split, manifest).check_sizes()


def _open(settings: Settings, directory: Path) -> _Data:
    """Every refusal that needs no model, in the order of what is quickest; then the splits."""
    manifest = read_manifest(directory)
    _check_sizes(directory, manifest)
    config = checks.load_config(settings)
    attention = checks.choose_attention(settings, config)
    checks.check_tokenizer(settings, directory, manifest)
    checks.check_vocabulary(settings, manifest, config)
    checks.check_template(settings, directory)
    max_length = settings.max_length or manifest.recipe["max_length"]
    checks.check_length(max_length, config)
    from dft_train.data.dataset import PackedSplit

    def split(name: str) -> PackedSplit:
        return PackedSplit(directory, manifest, name, max_length, attention, settings.build.get("packing"))

    train = None if settings.eval_only else split(TRAIN)
    if train is not None and not len(train):
        raise DataError(f"{directory}: the train split has no packs", remedy="see report.json for what was left out")
    if settings.eval_split in manifest.splits and manifest.splits[settings.eval_split].rows == 0:
        return _Data(directory, manifest, config, attention, train, None)
    evaluation = split(settings.eval_split)
    return _Data(directory, manifest, config, attention, train, evaluation if len(evaluation) else None)


def _refuse_nothing_to_evaluate(settings: Settings, data: _Data) -> None:
    """Where the split to be evaluated is empty: one warning, or an error if evaluating is all that was asked for."""
    if data.evaluation is not None:
        return
    what = f"{data.directory}: the {settings.eval_split} split is empty"
    if settings.eval_only:
        raise DataError(what, remedy="build the dataset with a larger --validation_split_percentage")
    if settings.training.get("eval_strategy", "no") != "no":
        launch.warn("%s, so nothing is evaluated", what)


def _make_trainer(settings: Settings, data: _Data, args: Any, signals: Signals) -> Any:
    from dft_train.loop import DftTrainer
    from dft_train.models.load import end_of_turn_id, load_model, teach_to_stop
    from dft_train.models.lora import is_adapted, with_adapter
    from dft_train.release.card import make_origin
    from dft_train.release.directory import Release

    started = time.monotonic()
    model = load_model(settings, args, data.manifest, data.attention)
    teach_to_stop(model, end_of_turn_id(data.directory, data.manifest))
    logs.get_logger().info("model %s loaded in %.1f s", settings.model_name_or_path, time.monotonic() - started)
    model = with_adapter(model, settings, data.manifest, args.seed)
    release = Release(
        origin=make_origin(settings, args, data.manifest, adapter=is_adapted(model)),
        dataset_dir=data.directory,
        output_dir=settings.output_dir,
        merges=settings.merge_lora,
    )
    return DftTrainer(
        model=model,
        args=args,
        train_split=data.train,
        eval_split=data.evaluation,
        dataset_dir=data.directory,
        dataset_fingerprint=data.manifest.fingerprint,
        objective=settings.objective,
        dft_alpha=settings.dft_alpha,
        objective_options=settings.objective_options,
        fused_loss=settings.fused_loss,
        attention=data.attention,
        peak_tflops=settings.peak_tflops,
        router_aux_loss_coef=settings.router_aux_loss_coef,
        signals=signals,
        on_nan=settings.on_nan,
        guards=settings.guards,
        release=release,
    )


def _evaluate(settings: Settings, data: _Data, args: Any, signals: Signals) -> None:
    trainer = _make_trainer(settings, data, args, signals)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        path = settings.output_dir / EVAL_RESULTS_NAME
        write_atomically(path, encode_json(metrics))
        logs.get_logger().info("wrote %s", path)


def _train(settings: Settings, data: _Data, args: Any, signals: Signals) -> int:
    """The exit code."""
    from dft_train.checkpoints.resume import choose_checkpoint
    from dft_train.metrics.trackers import open_trackers

    trainer = _make_trainer(settings, data, args, signals)
    checkpoint = choose_checkpoint(settings, trainer.agreement)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if trainer.is_world_process_zero():
        trainer.tracker_runs = open_trackers(trainer, trainer.tracker_runs, trainer.first_step)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.faults.stopping:
        trainer.faults.tell_how_to_go_on()
        return launch.EXIT_TERMINATED
    trainer.save_final()
    return 0


def _out_of_memory_explained(settings: Settings, data: _Data, args: Any) -> contextlib.AbstractContextManager[None]:
    split = data.train or data.evaluation

    def look(where: str) -> Situation:
        length = split.info.max_length
        return look_at(settings, args, attention=data.attention, max_length=length, where=where)

    return explained(look, lambda: predicted_ways(settings, args, data.config, data.manifest, split, data.attention))


def run(settings: Settings) -> int:
    """Do what the command line asks; the exit code. Raises DataError and SetupError for what the user can mend."""
    with Signals() as signals:
        try:
            return _run(settings, signals)
        except Stopped as stopped:
            launch.warn("%s before the first step: nothing is saved", stopped.name)
            return launch.EXIT_TERMINATED


def _run(settings: Settings, signals: Signals) -> int:
    logs.setup()
    launch.quieten()
    follow_parent()
    settings = adopt(settings)
    checks.check_output_dir(settings.output_dir)
    with Ranks() as ranks:
        with _dataset(settings) as directory:
            launch.quieten_transformers()
            data = _open(settings, directory)
            _refuse_nothing_to_evaluate(settings, data)
            from dft_train.checkpoints.resume import fit_accumulation
            from dft_train.plan.forecast import describe, planned_layout, print_plan, report_memory
            from dft_train.settings.training_arguments import make_training_arguments

            settings = fit_accumulation(settings)
            args = make_training_arguments(settings, evaluates=data.evaluation is not None)
            ranks.watch()

        if data.train is not None:
            logs.get_logger().info("%s", describe(data.train, data.evaluation, planned_layout(settings, args), args))
        if settings.dry_run:
            split = data.train or data.evaluation
            found = report_memory(settings, args, data.config, data.manifest, split, data.attention) if split else {}
            if logs.rank_and_world_size()[0] == 0:
                print_plan(found)
        else:
            with _out_of_memory_explained(settings, data, args):
                if not settings.eval_only:
                    return _train(settings, data, args, signals)
                _evaluate(settings, data, args, signals)
    return 0
