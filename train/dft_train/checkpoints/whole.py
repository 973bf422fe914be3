"""What a checkpoint is on disk: files, a list of them with their hashes, and a name that it has only when whole.

`saving` writes one, `resume` finds one. A checkpoint is made under a hidden name, its list of contents is written
last, and then it is renamed; so whatever happens to the run, a `checkpoint-N` is whole or is known not to be.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from dft_common.errors import DataError
from dft_common.fingerprint import hash_file
from dft_common.manifest import encode_json, write_atomically

STATE_NAME = "dft_train.json"
CONTENTS_NAME = "contents.json"
SAVING = ".saving-"
REMOVING = ".removing-"
"""Beginnings of names in output_dir: what a run was writing, or removing, when it was killed."""

_NAME = re.compile(r"checkpoint-(\d+)")
_OWNER = re.compile(r"(?:pp_rank|rng_state)_(\d+)[_.]")


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which packs a step takes, and the sums that were not logged yet."""

    dataset_fingerprint: str
    pack_index: str
    """Checksum of the index file."""
    data_seed: int
    global_batch: int
    unlogged: list[float]
    """`metrics.StepSums` over all ranks since the last log line."""
    ranks: int = 0
    """How many wrote the checkpoint."""
    tracker_runs: dict[str, str] = {}
    """`trackers.open_trackers`: by which the run goes on in the same runs of its trackers."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    bytes: int
    xxh3: str
    """`dft_common.fingerprint.hash_file`."""


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """Every file of a checkpoint but this list, by its path within."""

    files: dict[str, FileEntry]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def write_state(directory: Path, state: RunState) -> None:
    write_atomically(directory / STATE_NAME, encode_json(state))


def read_state(checkpoint: Path) -> RunState:
    """The state in `checkpoint`. Raises DataError where it is missing or damaged."""
    path = checkpoint / STATE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunState)
    except FileNotFoundError:
        raise DataError(f"{path}: missing, so this is no checkpoint of dft-train", remedy="start a new run") from None
    except msgspec.MsgspecError as error:
        raise DataError(f"{path}: damaged: {error}", remedy="resume from an earlier checkpoint") from None


def check_same_steps(checkpoint: Path, state: RunState, now: RunState) -> None:
    """Raise DataError where `state`, found in `checkpoint`, belongs to other steps than this run's (`now`)."""
    for name in ("dataset_fingerprint", "pack_index", "data_seed", "global_batch"):
        found, expected = getattr(state, name), getattr(now, name)
        if found != expected:
            raise DataError(
                f"{checkpoint}: its {name} is {found}, this run's is {expected}: the steps would not be the same",
                remedy="resume with the same dataset, --max_length and --data_seed (or --seed), and with the same "
                "product of ranks, --per_device_train_batch_size and --gradient_accumulation_steps",
            )


def step_of(checkpoint: Path) -> int:
    found = _NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Everything named as a checkpoint, whole or not, by step."""
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if step_of(path) >= 0 and path.is_dir()), key=step_of)


def files_in(directory: Path) -> list[str]:
    """Relative paths of all files, the list of contents left out; in order."""
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if path.as_posix() != CONTENTS_NAME)


def share_of(files: Iterable[str], rank: int, ranks: int) -> list[str]:
    """The files that `rank` of `ranks` wrote: those with its number in their names; rank 0 all others too.

    Each rank reads back its own, which its node still has in memory.
    """

    def owner(path: str) -> int:
        found = _OWNER.search(path)
        return int(found[1]) if found and int(found[1]) < ranks else 0

    return [path for path in files if owner(path) == rank]


def sync(path: Path) -> None:
    """Wait until a file's or a directory's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entries_of(directory: Path, files: Iterable[str]) -> dict[str, FileEntry]:
    """`files` brought to the disk, measured and hashed."""
    entries = {}
    for name in files:
        path = directory / name
        sync(path)
        entries[name] = FileEntry(bytes=path.stat().st_size, xxh3=hash_file(path))
    return entries


def publish(temporary: Path, checkpoint: Path, contents: Contents) -> None:
    """Give what lies in `temporary` its list of contents, and then its name. Replaces a `checkpoint` that is there."""
    write_atomically(temporary / CONTENTS_NAME, encode_json(contents))
    for directory in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync(directory)
    replaced = _hide(checkpoint) if checkpoint.exists() else None
    temporary.rename(checkpoint)
    sync(checkpoint.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def read_contents(checkpoint: Path) -> Contents | None:
    """None where there is no list of contents, or a damaged one."""
    try:
        return msgspec.json.decode((checkpoint / CONTENTS_NAME).read_bytes(), type=Contents)
    except (OSError, msgspec.MsgspecError):
        return None


def what_is_missing(checkpoint: Path) -> str | None:
    """What keeps `checkpoint` from being whole, as far as names and sizes tell; None for nothing."""
    contents = read_contents(checkpoint)
    if contents is None:
        return f"{CONTENTS_NAME} is missing or damaged, so it was not written to its end"
    for name, entry in contents.files.items():
        try:
            size = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry.bytes:
            return f"{name} has {size:,} bytes, expected {entry.bytes:,}"
    return None


def last_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint of which nothing is missing."""
    return next((path for path in reversed(checkpoints_in(output_dir)) if what_is_missing(path) is None), None)


def what_is_damaged(checkpoint: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """The first file of this rank's share whose content is not what was written; None where there is none."""
    contents = read_contents(checkpoint)
    assert contents is not None
    names = sorted(contents.files, key=lambda name: -contents.files[name].bytes)
    for name in names[rank::ranks]:
        try:
            if hash_file(checkpoint / name) != contents.files[name].xxh3:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _hide(checkpoint: Path) -> Path:
    hidden = checkpoint.with_name(REMOVING + checkpoint.name)
    if hidden.exists():
        shutil.rmtree(hidden)
    return checkpoint.rename(hidden)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; one that is half removed does not have its name any more."""
    shutil.rmtree(_hide(checkpoint))


def sweep(output_dir: Path) -> None:
    """Remove what killed runs left half written or half removed. To be called by one rank, while none saves.

    A checkpoint that lacked nothing but its name gets it.
    """
    if not output_dir.is_dir():
        return
    for path in sorted(output_dir.iterdir()):
        if not path.name.startswith((SAVING, REMOVING)) or not path.is_dir():
            continue
        named = path.with_name(path.name.removeprefix(SAVING))
        if path.name.startswith(SAVING) and not named.exists() and what_is_missing(path) is None:
            path.rename(named)
        else:
            shutil.rmtree(path, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, *, newest: Path, best: Path | None) -> None:
    """Remove the oldest whole checkpoints until `limit` are left; never `newest`, nor `best`.

    What is not whole is neither counted nor touched: it may be all that is left of something.
    """
    if limit is None or limit <= 0:
        return
    whole = [path for path in checkpoints_in(output_dir) if what_is_missing(path) is None]
    whole.sort(key=lambda path: ((path / CONTENTS_NAME).stat().st_mtime_ns, step_of(path)))
    kept = {newest.name} | ({best.name} if best is not None else set())
    removable = [path for path in whole if path.name not in kept]
    for path in removable[: max(len(whole) - max(limit, len(kept)), 0)]:
        remove(path)
