"""Which checkpoint a run goes on from, and in what layout. Called by `trainer`.

`--resume_from_checkpoint True` takes the newest whole one in the output directory, and says what is wrong with
those it passes over. Names and sizes are checked before anything slow; the contents once the ranks have met.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dft_common import logs
from dft_common.errors import DataError, SetupError
from dft_train.checkpoints.saving import first_error
from dft_train.checkpoints.whole import (
    STATE_NAME,
    checkpoints_in,
    files_in,
    last_whole,
    read_contents,
    read_state,
    sweep,
    what_is_damaged,
    what_is_missing,
)
from dft_train.ranks import launch
from dft_train.ranks.agree import Agreement
from dft_train.settings.arguments import Settings

_NEWEST = ("true", "yes", "1", "on")


def _check_resumable(checkpoint: Path, deepspeed: bool) -> None:
    if not (checkpoint / "trainer_state.json").is_file():
        raise SetupError(f"{checkpoint}: no trainer_state.json, so this is not a complete checkpoint")
    resumable = any(checkpoint.glob("global_step*")) if deepspeed else (checkpoint / "optimizer.pt").is_file()
    if not resumable:
        kind = "DeepSpeed " if deepspeed else ""
        raise SetupError(
            f"{checkpoint}: it holds no {kind}optimizer state, so it cannot be resumed (--save_only_model True, or a "
            "run with another --deepspeed, wrote it)",
            remedy="start anew from its weights with `--model_name_or_path CHECKPOINT`, or train with "
            "`--save_only_model False`",
        )


def _whole_ones(output_dir: Path) -> list[Path]:
    """Newest first. Raises DataError where there are checkpoints, and not one is whole."""
    whole, problems = [], []
    for path in reversed(checkpoints_in(output_dir)):
        problem = what_is_missing(path)
        if problem is None:
            whole.append(path)
            continue
        problems.append(f"{path}: {problem}")
        if not whole:
            launch.warn("%s: passed over", problems[-1])
    if problems and not whole:
        raise DataError(
            f"--resume_from_checkpoint True: no checkpoint in {output_dir} is whole",
            remedy="give the path of one to try it all the same, or leave the flag out to start anew",
        )
    return whole


def _given(resume: str, output_dir: Path) -> Path:
    checkpoint = Path(resume)
    if not checkpoint.is_dir():
        raise SetupError(
            f"--resume_from_checkpoint {resume}: there is no such directory",
            remedy="give a checkpoint's path, or True for the newest whole one in --output_dir",
        )
    # Optimizer state is read by unpickling, which is safe only for files that this run wrote.
    if checkpoint.resolve().parent != output_dir.resolve():
        raise SetupError(
            f"--resume_from_checkpoint {checkpoint}: not in --output_dir {output_dir}",
            remedy="resume with the --output_dir that the run had; only a run's own optimizer state is read",
        )
    problem = what_is_missing(checkpoint)
    if problem is not None and read_contents(checkpoint) is not None:
        raise DataError(
            f"{checkpoint}: {problem}",
            remedy="give `--resume_from_checkpoint True`: it takes the newest whole one",
        )
    if problem is not None:
        launch.warn("%s: there is no list of its contents to check it by: taken as it is", checkpoint)
    return checkpoint


def _refuse_to_start_over(output_dir: Path) -> None:
    """Raises SetupError where a fresh start would come among the checkpoints of an earlier run: --save_total_limit
    would remove them, and a resume after a crash would take the earlier run's, which has done more steps."""
    if last := last_whole(output_dir):
        raise SetupError(
            f"--output_dir {output_dir}: it holds checkpoints of an earlier run ({last.name}); this one starts anew",
            remedy="`--resume_from_checkpoint True` goes on from it; for a new run give another --output_dir, or move "
            "the checkpoints away",
        )


def candidates(settings: Settings) -> list[Path]:
    """The checkpoints that may be gone on from, the best first; none for a fresh start.

    Raises SetupError or DataError where one was asked for and there is none. Only names and sizes are looked at.
    """
    output_dir, deepspeed = settings.output_dir, bool(settings.training.get("deepspeed"))
    if settings.eval_only or settings.dry_run:
        return []
    if settings.resume is None:
        _refuse_to_start_over(output_dir)
        return []
    if settings.resume.lower() not in _NEWEST:
        found = [_given(settings.resume, output_dir)]
    else:
        found = _whole_ones(output_dir)
        if not found:
            launch.warn("--resume_from_checkpoint True: no checkpoint in %s, so this starts anew", output_dir)
    if found:
        _check_resumable(found[0], deepspeed)
    return found


def fit_accumulation(settings: Settings) -> Settings:
    """`settings` with the accumulation that makes a step of the checkpoint's global batch on this many ranks.

    Raises SetupError where there is none. Called before the process group is opened.
    """
    if logs.rank_and_world_size()[0] == 0 and settings.resume is not None:
        sweep(settings.output_dir)
    found = candidates(settings)
    if not found or not (found[0] / STATE_NAME).is_file():
        return settings
    wanted = read_state(found[0]).global_batch
    ranks = logs.rank_and_world_size()[1]
    per_device = int(settings.training.get("per_device_train_batch_size", 1))
    accumulation = int(settings.training.get("gradient_accumulation_steps", 1))
    if per_device * accumulation * ranks == wanted:
        return settings
    found_batch = f"{ranks} ranks x --per_device_train_batch_size {per_device}"
    if wanted % (per_device * ranks):
        raise SetupError(
            f"{found[0]}: a step takes {wanted} packs, which {found_batch} do not divide",
            remedy=_layouts_for(wanted, ranks),
        )
    fitting = wanted // (per_device * ranks)
    launch.warn(
        "%s: a step takes %s packs, so --gradient_accumulation_steps is %s and not %s (%s)",
        found[0],
        wanted,
        fitting,
        accumulation,
        found_batch,
    )
    return dataclasses.replace(settings, training={**settings.training, "gradient_accumulation_steps": fitting})


def _layouts_for(wanted: int, ranks: int) -> str:
    if wanted % ranks:
        fitting = [str(number) for number in range(1, wanted + 1) if wanted % number == 0]
        return f"use a number of ranks that divides {wanted}: {', '.join(fitting)}"
    share = wanted // ranks
    fitting = [str(number) for number in range(1, share + 1) if share % number == 0]
    return f"use a --per_device_train_batch_size that divides {share}: {', '.join(fitting)}"


def choose_checkpoint(settings: Settings, agreement: Agreement) -> Path | None:
    """The first candidate whose contents are what was written; each rank reads a part of them.

    Raises DataError where every one is damaged.
    """
    names = [path.name for path in candidates(settings)]
    names = agreement.gather(names)[0]
    rank, ranks = logs.rank_and_world_size()
    for name in names:
        checkpoint = settings.output_dir / name
        known = read_contents(checkpoint) is not None
        problem = first_error(agreement, what_is_damaged(checkpoint, rank, ranks) if known else None)
        if problem is None:
            logs.get_logger().info("going on from %s (%s files)", checkpoint, len(files_in(checkpoint)))
            return checkpoint
        launch.warn("%s: %s: passed over", checkpoint, problem)
    if names:
        raise DataError(
            f"--resume_from_checkpoint {settings.resume}: no checkpoint in {settings.output_dir} is whole",
            remedy="leave the flag out to start anew, in another --output_dir",
        )
    return None
