"""Writing a checkpoint, and the final model, together on all ranks, such that a failure to write costs no more.

A rank that cannot write goes on through every collective of the save, and at its end all ranks agree on what went
wrong: then the temporary directory is removed, one warning says why, and training goes on. Called by `checkpointed`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dft_common.errors import DataError
from dft_common.logs import get_logger
from dft_train.checkpoints.whole import (
    SAVING,
    Contents,
    FileEntry,
    RunState,
    entries_of,
    files_in,
    last_whole,
    publish,
    read_contents,
    rotate,
    share_of,
    sweep,
    write_state,
)
from dft_train.ranks import launch
from dft_train.ranks.agree import Agreement

_TORCH_WRITES = ("inline_container", "PytorchStreamWriter", "iostream error", "write():")
"""In the messages of the RuntimeErrors that torch raises where a file cannot be written."""
_FINAL = SAVING + "final"
_STALE = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
)


def _is_write_error(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _TORCH_WRITES)
    return isinstance(error, OSError | SafetensorError)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    if isinstance(error, RuntimeError) and "write():" not in str(error):
        return "a file could not be written to its end"
    return str(error)


class Writes:
    """What this rank could not write since `clear`. After the first failure nothing more is tried."""

    def __init__(self) -> None:
        self.error: str | None = None

    def clear(self) -> None:
        self.error = None

    def attempt(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`write(...)`, which must fail only when it is through with its collectives. None where it fails."""
        if self.error is not None:
            return None
        try:
            return write(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_write_error(error):
                raise
            self.error = _reason(error)
            return None


def first_error(agreement: Agreement, error: str | None) -> str | None:
    """The error of the first rank that has one, on all ranks; none goes on before all are here."""
    errors = agreement.gather(error)
    found = [(rank, text) for rank, text in enumerate(errors) if text is not None]
    if not found:
        return None
    rank, text = found[0]
    return f"rank {rank}: {text}" if len(errors) > 1 else text


@contextlib.contextmanager
def _guarded(engine: Any, writes: Writes) -> Iterator[None]:
    """DeepSpeed's writes become attempts: there are collectives behind them, in which other ranks would wait."""
    inner = engine.checkpoint_engine
    save, script = inner.save, engine._copy_recovery_script
    inner.save = lambda *args, **kwargs: writes.attempt(save, *args, **kwargs)
    engine._copy_recovery_script = lambda *args: writes.attempt(script, *args)
    try:
        yield
    finally:
        del inner.save, engine._copy_recovery_script


def _save_optimizer(trainer: Any, directory: Path) -> None:
    writes, lead = trainer.writes, trainer.args.should_save
    own_schedule = True
    if trainer.is_deepspeed_enabled:
        from accelerate.utils import DeepSpeedSchedulerWrapper
        from transformers.trainer_utils import _is_peft_model

        engine = trainer.model_wrapped
        tag = f"global_step{engine.global_steps}"
        with _guarded(engine, writes):
            frozen_left_out = _is_peft_model(trainer.model)
            engine.save_checkpoint(str(directory), tag, save_latest=False, exclude_frozen_parameters=frozen_left_out)
        if lead:
            writes.attempt((directory / "latest").write_text, tag)
        own_schedule = not isinstance(trainer.lr_scheduler, DeepSpeedSchedulerWrapper)
    elif lead:
        writes.attempt(torch.save, trainer.optimizer.state_dict(), directory / "optimizer.pt")
    if lead and own_schedule:
        writes.attempt(torch.save, trainer.lr_scheduler.state_dict(), directory / "scheduler.pt")
    writes.attempt(trainer._save_scaler, str(directory))
    writes.attempt(trainer._save_rng_state, str(directory))


def _write_all(trainer: Any, directory: Path, state: RunState) -> str | None:
    """Everything but the list of contents; what went wrong, on any rank."""
    writes, lead = trainer.writes, trainer.args.should_save
    if lead:
        writes.attempt(directory.mkdir, parents=True)
    if error := first_error(trainer.agreement, writes.error):
        return error
    writes.attempt(trainer.save_model, str(directory), _internal_call=True)
    if not trainer.args.save_only_model:
        _save_optimizer(trainer, directory)
    if lead:
        writes.attempt(write_state, directory, state)
        writes.attempt(trainer.state.save_to_json, str(directory / "trainer_state.json"))
    return first_error(trainer.agreement, writes.error)


def _finish(trainer: Any, temporary: Path, checkpoint: Path) -> str | None:
    """Bring it to the disk, list and name it; what went wrong, on any rank."""
    writes, agreement, args = trainer.writes, trainer.agreement, trainer.args
    own = share_of(files_in(temporary), args.process_index, args.world_size)
    entries: dict[str, FileEntry] = writes.attempt(entries_of, temporary, own) or {}
    if error := first_error(agreement, writes.error):
        return error
    parts = agreement.gather({name: (entry.bytes, entry.xxh3) for name, entry in entries.items()})
    if args.should_save:
        files = {name: FileEntry(bytes=size, xxh3=xxh3) for part in parts for name, (size, xxh3) in part.items()}
        writes.attempt(publish, temporary, checkpoint, Contents(files=dict(sorted(files.items()))))
    return first_error(agreement, writes.error)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def _checkpoint_bytes(trainer: Any, last: Path | None) -> float:
    """What a checkpoint takes: as much as the last one, or weights and (in float32) what AdamW keeps."""
    contents = read_contents(last) if last is not None else None
    if contents is not None:
        return contents.bytes
    parameters = list(trainer.model.parameters())
    sizes = [(getattr(one, "ds_numel", one.numel()), one.element_size(), one.requires_grad) for one in parameters]
    states = 0 if trainer.args.save_only_model else 12 if trainer.is_deepspeed_enabled else 8
    return sum(count * (size + states * trained) for count, size, trained in sizes)


def _describe_failure(trainer: Any, error: str, output_dir: Path) -> str:
    last = last_whole(output_dir)
    free = shutil.disk_usage(output_dir if output_dir.is_dir() else Path()).free
    return (
        f"{error}; a checkpoint takes about {_gb(_checkpoint_bytes(trainer, last))}, {_gb(free)} are free in "
        f"{output_dir}; " + (f"the last whole checkpoint is {last}" if last else "there is no whole checkpoint yet")
    )


def _what_helps(args: Any) -> str:
    flags = [] if args.save_only_model else ["--save_only_model True (which cannot be resumed)"]
    if args.save_total_limit is None:
        flags.insert(0, "--save_total_limit 2")
    return "free some space; the next checkpoint is tried as planned" + (
        f". In another run: {', or '.join(flags)}" if flags else ""
    )


def save_checkpoint(trainer: Any, state: RunState) -> bool:
    """Write `checkpoint-STEP` of a `CheckpointedTrainer`, on all ranks; False where it could not be written.

    `state` goes with it. Then older ones are removed, as --save_total_limit says.
    """
    args, step = trainer.args, trainer.state.global_step
    output_dir = Path(str(args.output_dir))
    checkpoint = output_dir / f"checkpoint-{step}"
    temporary = output_dir / (SAVING + checkpoint.name)
    trainer.writes.clear()
    if args.should_save:
        sweep(output_dir)
    error = _write_all(trainer, temporary, state) or _finish(trainer, temporary, checkpoint)
    if error is not None:
        if args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
            launch.warn(
                "step %s: the checkpoint was not written, training goes on without it: %s. What to do: %s",
                step,
                _describe_failure(trainer, error, output_dir),
                _what_helps(args),
            )
        return False
    if args.should_save:
        best = trainer.state.best_model_checkpoint
        try:
            rotate(output_dir, args.save_total_limit, newest=checkpoint, best=Path(best) if best else None)
        except OSError as problem:
            launch.warn("an older checkpoint could not be removed: %s", problem)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(checkpoint))
    return True


def _move_into(output_dir: Path, temporary: Path) -> None:
    """Put the finished files in their place, and no weights of an earlier save beside them."""
    new = {path.name for path in temporary.iterdir()}
    for path in temporary.iterdir():
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    for pattern in _STALE:
        for path in output_dir.glob(pattern):
            if path.name not in new:
                path.unlink()
    temporary.rmdir()


def save_final(trainer: Any) -> None:
    """The model and trainer_state.json in output_dir itself, on all ranks. Raises DataError where that fails."""
    output_dir = Path(str(trainer.args.output_dir))
    temporary = output_dir / _FINAL
    writes, lead = trainer.writes, trainer.args.should_save
    writes.clear()
    if lead:
        sweep(output_dir)
        writes.attempt(temporary.mkdir, parents=True)
    error = first_error(trainer.agreement, writes.error)
    if error is None:
        writes.attempt(trainer.save_model, str(temporary))
        if lead:
            writes.attempt(trainer.state.save_to_json, str(temporary / "trainer_state.json"))
            writes.attempt(entries_of, temporary, files_in(temporary))
            writes.attempt(_move_into, output_dir, temporary)
        error = first_error(trainer.agreement, writes.error)
    if error is None:
        get_logger().info("saved the final model in %s", output_dir)
        if trainer.args.push_to_hub:
            trainer.push_to_hub(commit_message="Model save")
        return
    if lead:
        shutil.rmtree(temporary, ignore_errors=True)
    last = last_whole(output_dir)
    resume = f", then go on from {last} with `--resume_from_checkpoint True`" if last is not None else ""
    raise DataError(
        f"the final model could not be saved: {_describe_failure(trainer, error, output_dir)}",
        remedy=f"free some space (or remove a checkpoint that is not needed){resume}",
    )
