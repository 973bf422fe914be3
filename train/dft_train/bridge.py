"""`--data_files`: rank 0 runs `dft-prep build` into RUN/dataset, the other ranks wait. Called by `trainer`.

The build is a command like any other: `python -m dft_prep build ...` in a process of its own, whose exit code
passes through. No collective waits for it (one would time out on a large corpus): the other ranks poll a status
file in the run's directory, which all nodes must share, as they must share the dataset.

A status file that an earlier run left behind is never taken for this run's. Rank 0 touches its file every
second while it lives, and a file that is not being touched is dead; and the file's name holds what is this
launch's alone: what `ranks` or `slurm` made up for it; else the launcher's process and its start time on one node,
its address and run id on several.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from dft_common import logs
from dft_common.errors import EXIT_INTERRUPTED, SetupError
from dft_common.fingerprint import hash_object
from dft_common.flags import to_arguments
from dft_common.manifest import encode_json, write_atomically
from dft_train.ranks.launch import LAUNCH_ID, local_world_size
from dft_train.settings.arguments import Settings

DATASET_NAME = "dataset"
HEARTBEAT_SECONDS = 1.0
DEAD_SECONDS = 60.0
"""A status file untouched for so long means that rank 0 is gone (long enough for a slow network disk)."""
START_SECONDS = 600.0
"""How long rank 0 may take to show itself at all."""
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


class Status(msgspec.Struct, frozen=True, kw_only=True):
    state: Literal["building", "done", "failed"]
    exit_code: int = 0


def launch_key() -> str:
    """The same for all ranks of this launch, and for no other."""
    if LAUNCH_ID in os.environ:
        return hash_object(os.environ[LAUNCH_ID])[:12]
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    parts = [os.environ.get(name, "") for name in names]
    if local_world_size() == logs.rank_and_world_size()[1]:
        import psutil

        parent = psutil.Process(os.getppid())
        parts += [str(parent.pid), str(parent.create_time())]
    return hash_object(parts)[:12]


def _source_argument(item: Any) -> str:
    """A source of --data_files as an argument: text, or a mapping of a config file with a name and a path."""
    if not isinstance(item, Mapping):
        return str(item)
    if more := sorted(set(item) - {"name", "path"}):
        raise SetupError(
            f"data_files: {', '.join(more)} cannot be handed on to the build",
            remedy="run `dft-prep build --config FILE` yourself, then train with `--dataset_dir`",
        )
    if "path" not in item:
        raise SetupError(f"data_files: {dict(item)} has no `path`", remedy="give each source a `path`")
    return f"{item['name']}={item['path']}" if "name" in item else str(item["path"])


def build_command(settings: Settings) -> list[str]:
    """The command that builds the dataset, with the flags that were given."""
    flags: dict[str, Any] = {"tokenizer": settings.model_name_or_path, **settings.build}
    files = flags.pop("data_files")
    flags["output_dir"] = str(settings.output_dir / DATASET_NAME)
    sources = [_source_argument(item) for item in files]
    return [sys.executable, "-m", "dft_prep", "build", *to_arguments({"data_files": sources, **flags})]


def _status_path(output_dir: Path) -> Path:
    return output_dir / f".dft-build-{launch_key()}.json"


@contextlib.contextmanager
def _heartbeat(path: Path) -> Iterator[None]:
    """Touch `path` every second, until the block is left."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="build-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _run_build(settings: Settings) -> int:
    command = build_command(settings)
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    logs.get_logger().info("building the dataset in %s", settings.output_dir / DATASET_NAME)
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr.fileno())
    try:
        return process.wait()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        # Also on SIGTERM, which was sent to this process alone: the build must not outlive the run that wants it.
        if process.poll() is None:
            process.terminate()
            process.wait()


def _wait_for_build(path: Path) -> int:
    """Poll rank 0's status file until it is done or failed; its exit code."""
    own = path.with_name(f"{path.name}.rank-{os.environ.get('RANK', '0')}")
    started = time.monotonic()
    try:
        while True:
            own.touch()
            try:
                age = own.stat().st_mtime - path.stat().st_mtime
                status = msgspec.json.decode(path.read_bytes(), type=Status)
            except (FileNotFoundError, msgspec.MsgspecError):
                age, status = DEAD_SECONDS + 1, None
            if status is not None and age <= DEAD_SECONDS and status.state != "building":
                return status.exit_code
            patience = START_SECONDS if status is None else DEAD_SECONDS
            if age > DEAD_SECONDS and time.monotonic() - started > patience:
                raise SetupError(
                    f"{path}: rank 0 shows no sign of life, so the dataset will not come",
                    remedy="see rank 0's messages; on several nodes all must share the file system of --output_dir",
                )
            if age <= DEAD_SECONDS:
                started = time.monotonic()
            time.sleep(0.2)
    finally:
        own.unlink(missing_ok=True)


@contextlib.contextmanager
def built_dataset(settings: Settings) -> Iterator[Path]:
    """The dataset of --data_files, on every rank; to be left once the ranks have met.

    Where the build fails, every rank exits with its exit code; what was wrong the build has said.
    """
    dataset_dir = settings.output_dir / DATASET_NAME
    rank, world_size = logs.rank_and_world_size()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    path = _status_path(settings.output_dir)
    if rank > 0:
        if code := _wait_for_build(path):
            raise SystemExit(code)
        yield dataset_dir
        return
    write_atomically(path, encode_json(Status(state="building")))
    try:
        with _heartbeat(path):
            code = _run_build(settings)
            write_atomically(path, encode_json(Status(state="failed" if code else "done", exit_code=code)))
            if code:
                # Long enough for the others to read it, before a launcher ends them without a word. It may end this
                # rank too, once one of them has left: the status file is to go all the same.
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
                time.sleep(HEARTBEAT_SECONDS if world_size > 1 else 0)
                raise SystemExit(code)
            yield dataset_dir
    finally:
        path.unlink(missing_ok=True)
