"""A training run from beginning to end, on one page. Called by `cli` with parsed settings.

1. the dataset: given, or built now (`bridge`); 2. refusals, before anything is slow (`checks`); 3. the plan
(`plan`); 4. the model (`model`); 5. training or evaluation (`loop`); 6. what is left behind (`checkpoints`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dft_common import logs
from dft_common.errors import DataError
from dft_common.manifest import Manifest, encode_json, read_manifest, write_atomically
from dft_common.reader import SplitReader
from dft_common.schema import TRAIN
from dft_train import checks, launch
from dft_train.arguments import Settings
from dft_train.bridge import built_dataset

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
    ignored = [f"--{name}" for name in settings.build if name not in ("max_length", "seed")]
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
    attention = checks.choose_attention(settings)
    checks.check_tokenizer(settings, directory, manifest)
    checks.check_vocabulary(settings, manifest, config)
    checks.check_template(settings, directory)
    max_length = settings.max_length or manifest.recipe["max_length"]
    checks.check_length(max_length, config)
    from dft_train.dataset import PackedSplit

    def split(name: str) -> PackedSplit:
        return PackedSplit(directory, manifest, name, max_length, attention)

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


def _make_trainer(settings: Settings, data: _Data, args: Any) -> Any:
    from dft_train.loop import DftTrainer
    from dft_train.model import end_of_turn_id, load_model, teach_to_stop

    started = time.monotonic()
    model = load_model(settings, args, data.manifest, data.attention)
    teach_to_stop(model, end_of_turn_id(data.directory, data.manifest))
    logs.get_logger().info("model %s loaded in %.1f s", settings.model_name_or_path, time.monotonic() - started)
    return DftTrainer(
        model=model,
        args=args,
        train_split=data.train,
        eval_split=data.evaluation,
        dataset_dir=data.directory,
        dataset_fingerprint=data.manifest.fingerprint,
        objective=settings.objective,
        dft_alpha=settings.dft_alpha,
        attention=data.attention,
    )


def _evaluate(settings: Settings, data: _Data, args: Any) -> None:
    trainer = _make_trainer(settings, data, args)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        path = settings.output_dir / EVAL_RESULTS_NAME
        write_atomically(path, encode_json(metrics))
        logs.get_logger().info("wrote %s", path)


def _train(settings: Settings, data: _Data, args: Any) -> None:
    from dft_train.checkpoints import find_checkpoint, read_state
    from dft_train.trackers import open_trackers

    checkpoint = find_checkpoint(settings.resume, settings.output_dir, deepspeed=bool(args.deepspeed))
    trainer = _make_trainer(settings, data, args)
    if checkpoint is not None:
        step = int(checkpoint.name.rpartition("-")[2])
        trainer.restore(read_state(checkpoint, trainer.run_state([])), step)
        logs.get_logger().info("going on from %s", checkpoint)
    if trainer.is_world_process_zero():
        open_trackers(args.report_to, run_name=args.run_name, resumes=checkpoint is not None)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    trainer.save_state()
    logs.get_logger().info("saved the final model in %s", settings.output_dir)


@contextlib.contextmanager
def _ranks() -> Iterator[None]:
    try:
        yield
    finally:
        launch.leave_ranks()


def run(settings: Settings) -> int:
    """Do what the command line asks; the exit code. Raises DataError and SetupError for what the user can mend."""
    logs.setup()
    launch.quieten()
    with _ranks():
        with _dataset(settings) as directory:
            launch.quieten_transformers()
            data = _open(settings, directory)
            _refuse_nothing_to_evaluate(settings, data)
            from dft_train.plan import describe, parameters_of, report_memory
            from dft_train.training_arguments import make_training_arguments

            # Counted before DeepSpeed is known to transformers: its ZeRO-3 would want real weights.
            parameters = parameters_of(data.config, settings.trust_remote_code) if settings.dry_run else 0
            args = make_training_arguments(settings, evaluates=data.evaluation is not None)
        from dft_train.sampler import train_layout

        if data.train is not None:
            logs.get_logger().info("%s", describe(data.train, data.evaluation, train_layout(args), args))
        if settings.dry_run:
            report_memory(parameters, args)
        elif settings.eval_only:
            _evaluate(settings, data, args)
        else:
            _train(settings, data, args)
    return 0
