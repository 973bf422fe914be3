"""What goes into a checkpoint besides weights, and where a run goes on from. Called by `trainer` and `loop`.

`--save_only_model` checkpoints are models and no more; the others hold optimizer, scheduler and random states
too, and `dft_train.json`, by which a resumed run proves that it continues the same steps of the same packs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from dft_common.errors import DataError, SetupError
from dft_common.manifest import encode_json, write_atomically
from dft_common.schema import TOKENIZER_DIR
from dft_train import launch

STATE_NAME = "dft_train.json"
_LAST = ("true", "yes", "1", "on")


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which packs a step takes, and the sums that were not logged yet."""

    dataset_fingerprint: str
    pack_index: str
    """Checksum of the index file."""
    data_seed: int
    global_batch: int
    unlogged: list[float]
    """`metrics.StepSums` over all ranks since the last log line."""


def copy_tokenizer(dataset_dir: Path, output_dir: Path) -> None:
    """The dataset's tokenizer and chat template, beside the weights that learnt them."""
    for path in sorted((dataset_dir / TOKENIZER_DIR).iterdir()):
        if path.is_file():
            shutil.copyfile(path, output_dir / path.name)


def write_state(directory: Path, state: RunState) -> None:
    write_atomically(directory / STATE_NAME, encode_json(state))


def read_state(checkpoint: Path, expected: RunState) -> RunState:
    """The state in `checkpoint`. Raises DataError where it belongs to other steps than `expected` (its sums aside)."""
    path = checkpoint / STATE_NAME
    try:
        state = msgspec.json.decode(path.read_bytes(), type=RunState)
    except FileNotFoundError:
        raise DataError(f"{path}: missing, so this is no checkpoint of dft-train", remedy="start a new run") from None
    except msgspec.MsgspecError as error:
        raise DataError(f"{path}: damaged: {error}", remedy="resume from an earlier checkpoint") from None
    for name in ("dataset_fingerprint", "pack_index", "data_seed", "global_batch"):
        found, now = getattr(state, name), getattr(expected, name)
        if found != now:
            raise DataError(
                f"{checkpoint}: its {name} is {found}, this run's is {now}: the steps would not be the same",
                remedy="resume with the same dataset, --max_length and --data_seed, and with the same product of "
                "ranks, --per_device_train_batch_size and --gradient_accumulation_steps",
            )
    return state


def _last_checkpoint(output_dir: Path) -> Path | None:
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    return Path(found) if found else None


def _check_complete(checkpoint: Path, deepspeed: bool) -> None:
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


def find_checkpoint(resume: str | None, output_dir: Path, *, deepspeed: bool) -> Path | None:
    """The checkpoint to go on from; None for a fresh start. Raises SetupError where it cannot be resumed."""
    if resume is None:
        return None
    if resume.lower() in _LAST:
        checkpoint = _last_checkpoint(output_dir)
        if checkpoint is None:
            launch.warn("--resume_from_checkpoint True: no checkpoint in %s, so this starts anew", output_dir)
            return None
    else:
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise SetupError(
                f"--resume_from_checkpoint {resume}: there is no such directory",
                remedy="give a checkpoint's path, or True for the last one in --output_dir",
            )
    # Optimizer state is read by unpickling, which is safe only for files that this run wrote.
    if checkpoint.resolve().parent != output_dir.resolve():
        raise SetupError(
            f"--resume_from_checkpoint {checkpoint}: not in --output_dir {output_dir}",
            remedy="resume with the --output_dir that the run had; only a run's own optimizer state is read",
        )
    _check_complete(checkpoint, deepspeed)
    return checkpoint
