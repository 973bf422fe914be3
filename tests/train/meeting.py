"""Ranks that only meet and are watched, in place of a training: `python meeting.py CASE...` runs each case.

Prints, as JSON, for each case a list of (exit code, seconds from the first end to its own, stderr) by rank.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

GRACE_SECONDS = 1.5
AT_ONCE = 4


def _wait_for(source: int) -> None:
    """In a collective whose partner lives and never comes."""
    import torch
    import torch.distributed as dist

    dist.recv(torch.zeros(1), src=source)


def _die(rank: int, of: int, how: Callable[[], object]) -> None:
    """Rank `of` ends by `how`; of the others one waits for another that is busy elsewhere."""
    time.sleep(0.3)
    others = [other for other in range(3) if other != of]
    if rank == of:
        how()
    elif rank == others[0]:
        _wait_for(others[1])
    else:
        time.sleep(60)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(error: BaseException) -> None:
    raise error


def _all_wait_for(rank: int, of: int, how: Callable[[], object]) -> None:
    """All but `of` wait for it."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1))
    if rank == of:
        how()
    dist.all_reduce(torch.zeros(1))


def _speak_slowly() -> None:
    """As where a terminal is slow: the main thread could leave long before the words are out."""
    from dft_common import logs

    for handler in logs.get_logger().handlers:
        handler.addFilter(lambda record: time.sleep(0.5) or True)


def _data_error(text: str) -> Exception:
    from dft_common.errors import DataError

    return DataError(text, remedy="mend it")


CASES: dict[str, Callable[[int], object]] = {
    "kill-0": lambda rank: _die(rank, 0, _kill),
    "kill-2": lambda rank: _die(rank, 2, _kill),
    "error-0": lambda rank: _die(rank, 0, lambda: _raise(ValueError("the cat\nsat"))),
    "error-1": lambda rank: _die(rank, 1, lambda: _raise(_data_error("the dog"))),
    "exit-1": lambda rank: _die(rank, 1, lambda: sys.exit(0)),
    "collective-0": lambda rank: _all_wait_for(rank, 0, lambda: _raise(ValueError("the cat"))),
    "collective-1": lambda rank: _all_wait_for(rank, 1, lambda: _raise(ValueError("the cat"))),
    "collective-kill": lambda rank: _all_wait_for(rank, 1, _kill),
    "collective-kill-slow-to-speak": lambda rank: (_speak_slowly(), _all_wait_for(rank, 1, _kill)),
    "alike": lambda rank: _raise(_data_error("the same for all")),
    "end-0-first": lambda rank: time.sleep(rank),
    "end-0-last": lambda rank: time.sleep(2 - rank),
}


def _run_rank(rank: int, case: str) -> int:
    """In the child: as `dft_train.trainer` and its command line do."""
    import torch.distributed as dist

    from dft_common import logs
    from dft_common.errors import DftError, report_error
    from dft_train.ranks import watch

    watch.GRACE_SECONDS = GRACE_SECONDS
    logs.setup()
    try:
        with watch.Ranks() as ranks:
            dist.init_process_group("gloo")
            ranks.watch()
            CASES[case](rank)
    except DftError as error:
        return report_error(error)
    return 0


def _become_rank(rank: int, case: str, environment: dict[str, str], output: Path) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    code = 1
    try:
        code = _run_rank(rank, case)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(case: str, folder: Path) -> list[tuple[int, float, str]]:
    from dft_train.ranks.launch import free_port

    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pids = {}
    for rank in range(3):
        if (pid := os.fork()) == 0:
            _become_rank(rank, case, shared, folder / f"{case}-{rank}")
        pids[pid] = rank
    ended: dict[int, tuple[int, float]] = {}
    first = 0.0
    while len(ended) < 3:
        pid, status = os.wait()
        first = first or time.monotonic()
        ended[pids[pid]] = (os.waitstatus_to_exitcode(status), time.monotonic() - first)
    return [(*ended[rank], (folder / f"{case}-{rank}").read_text()) for rank in range(3)]


if __name__ == "__main__":
    import torch.distributed  # noqa: F401

    import dft_train.ranks.watch  # noqa: F401

    # Ranks mostly wait for one another, so a few meetings go on at once.
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("fork").Pool(AT_ONCE) as pool:
        ends = pool.starmap(_run, [(case, Path(folder)) for case in sys.argv[1:]], chunksize=1)
        print(json.dumps(dict(zip(sys.argv[1:], ends, strict=True))))
