"""`--num_gpus N`: this command starts its own ranks, one process for each device of this machine. Called by `cli`.

The parent imports no torch. It passes signals on, and its exit code is that of the rank that failed first. Where one
fails and the others do not fail alike, they are ended too, and the parent's last line tells which rank it was and
why. A rank reads a pipe that only the parent holds open: should the parent be killed, the ranks end as on SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from dft_common import logs
from dft_common.errors import EXIT_INTERRUPTED, SetupError
from dft_train.ranks import slurm
from dft_train.ranks.launch import ERROR_FILE, EXIT_TERMINATED, LAUNCH_ID, free_port

ALIKE_SECONDS = 2.0
"""How long the others may take to fail like the first, by themselves."""
TERM_SECONDS = 20.0
"""How long a rank that is told to end may take, once another has failed."""
ORPHAN_SECONDS = 60.0
"""How long a rank without a parent may take to save and end."""
_COMMAND = (sys.executable, "-m", "dft_train")
_PIPE = "DFT_PARENT_PIPE"
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ASKED_FOR = (EXIT_INTERRUPTED, EXIT_TERMINATED)
"""Ranks that end on a signal may take their time."""
_BY_SIGNAL = {
    signal.SIGKILL: " (killed; when memory runs out the kernel does so, and `dmesg` tells)",
    signal.SIGSEGV: " (a crash in a library's code)",
    signal.SIGABRT: " (given up by a library, which has told why above)",
}


class _Rank(NamedTuple):
    number: int
    process: subprocess.Popen[bytes]
    error_file: Path


def refuse_second_launcher() -> None:
    """Raises SetupError where the environment is already a launcher's."""
    found = next((name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ), None)
    if found is None and not slurm.in_step():
        return
    what = f"{found}={os.environ[found]} in the environment" if found else "a step of srun with several tasks"
    raise SetupError(
        f"--num_gpus starts the ranks itself, but another launcher has started them already ({what})",
        remedy="leave --num_gpus out under torchrun, deepspeed and srun: they have their own number of processes",
    )


def started_here() -> bool:
    """Whether this process is a rank that `run_ranks` started."""
    return _PIPE in os.environ


def _exit_code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _start(count: int, arguments: Sequence[str], folder: Path, pipe: int) -> list[_Rank]:
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {LAUNCH_ID: secrets.token_hex(8), _PIPE: pipe}
    # As torchrun does, but not with one thread for all: without accelerators the cores are what computes.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    command = [*_COMMAND, *arguments]
    ranks = []
    for number in range(count):
        own = {**shared, "RANK": number, "LOCAL_RANK": number, ERROR_FILE: folder / f"{number}.json"}
        environment = {**threads, **os.environ, **{name: str(value) for name, value in own.items()}}
        # A session of its own: Ctrl-C reaches the parent alone, which passes it on.
        process = subprocess.Popen(command, env=environment, pass_fds=[pipe], start_new_session=True)
        ranks.append(_Rank(number, process, folder / f"{number}.json"))
    return ranks


@contextlib.contextmanager
def _forwarding(ranks: Sequence[_Rank]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        _signal(ranks, signal.Signals(number))

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(ranks: Sequence[_Rank], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(number)


def _wait(ranks: Sequence[_Rank], seconds: float) -> bool:
    """Whether all have ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while any(rank.process.poll() is None for rank in ranks):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _own_error(rank: _Rank) -> str:
    """The error that a rank has left behind, or what its exit code says."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads(rank.error_file.read_text("utf-8"))["message"]["message"])
    code = rank.process.returncode
    if code < 0:
        return f"ended by {signal.Signals(-code).name}{_BY_SIGNAL.get(signal.Signals(-code), '')}"
    return f"exit code {code}, without a word"


def _first_failed(ranks: Sequence[_Rank]) -> _Rank | None:
    """Of those that have failed by now: one that says why comes before one killed, and that before any other."""
    failed = [rank for rank in ranks if rank.process.poll()]
    return min(failed, key=lambda rank: (not rank.error_file.exists(), rank.process.returncode > 0), default=None)


def _watch(ranks: Sequence[_Rank]) -> int:
    """Until all have ended; the exit code."""
    while (failed := _first_failed(ranks)) is None:
        if all(rank.process.poll() == 0 for rank in ranks):
            return 0
        time.sleep(0.05)
    patience = TERM_SECONDS if failed.process.returncode in _ASKED_FOR else ALIKE_SECONDS
    alike = _wait(ranks, patience) and len({rank.process.returncode for rank in ranks}) == 1
    # By now the one that broke the others has ended too.
    first = _first_failed(ranks) or failed
    if not alike:
        _signal(ranks, signal.SIGTERM)
        if not _wait(ranks, TERM_SECONDS):
            _signal(ranks, signal.SIGKILL)
            _wait(ranks, TERM_SECONDS)
        sys.stderr.flush()
        logs.get_logger().error("rank %d was the first to end: %s", first.number, _own_error(first))
    return _exit_code(first.process.returncode)


def run_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run `dft-train ARGUMENTS` as `count` ranks on this machine; the exit code of the first that failed, or 0."""
    refuse_second_launcher()
    logs.setup()
    for_ranks, held_open = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="dft-ranks-") as folder:
            ranks = _start(count, arguments, Path(folder), for_ranks)
            with _forwarding(ranks):
                return _watch(ranks)
    finally:
        os.close(for_ranks)
        os.close(held_open)


def follow_parent() -> None:
    """In a rank that `run_ranks` started: end as on SIGTERM once the parent is gone."""
    if not started_here():
        return

    def wait(pipe: int) -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(EXIT_TERMINATED)

    threading.Thread(target=wait, args=(int(os.environ[_PIPE]),), name="parent", daemon=True).start()
