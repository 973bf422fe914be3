"""Run work units: in this process, or in a pool of processes. The result does not depend on which.

Called by `build`. Results come in the order in which units finish.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dft_common.errors import SetupError
from dft_prep.encode import BatchEncoder
from dft_prep.units import Unit, unit_fingerprint
from dft_prep.work import UnitResult, WorkContext, Worker, make_batch_encoder

_POOL_FROM_BYTES = 8_000_000
"""Below this, starting a pool takes longer than the work."""

_ASK_EVERY = 0.2  # seconds: how long Ctrl-C may wait to be seen

Result = TypeVar("Result")
_worker: Worker | None = None


def default_workers() -> int:
    """Every core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _die_with_parent() -> None:
    """End this worker when the build is killed, so that no orphan goes on writing."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start(context: WorkContext | None) -> None:
    global _worker
    # Ctrl-C reaches every process of the terminal; the build alone answers it, and lets running units finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    if context is not None:
        _worker = Worker(context, make_batch_encoder(context))


def _run_in_pool(unit: Unit) -> UnitResult:
    assert _worker is not None
    return _worker.run(unit)


def run_units(
    units: Sequence[Unit], context: WorkContext, encoder: BatchEncoder, workers: int
) -> Iterator[tuple[int, UnitResult]]:
    """(number of the unit, its result), as they finish. encoder: for this process; a pool's workers make their own."""
    if _use_pool(units, workers):
        yield from _pooled(units, _run_in_pool, context, workers)
    else:
        worker = Worker(context, encoder)
        for number, unit in enumerate(units):
            yield number, worker.run(unit)


def fingerprint_units(units: Sequence[Unit], workers: int) -> list[str]:
    """The fingerprint of every unit, in order: what tells whether a source has changed."""
    if not _use_pool(units, workers):
        return [unit_fingerprint(unit) for unit in units]
    found = dict(_pooled(units, unit_fingerprint, None, workers))
    return [found[number] for number in range(len(units))]


def _use_pool(units: Sequence[Unit], workers: int) -> bool:
    return workers > 1 and len(units) > 1 and sum(unit.size for unit in units) >= _POOL_FROM_BYTES


@contextlib.contextmanager
def _interrupt_when_asked() -> Iterator[Callable[[], None]]:
    """Ctrl-C is kept until the block asks for it: raised inside one of the pool's locks, it would lock it for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed = threading.Event()

    def ask() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield ask
    finally:
        signal.signal(signal.SIGINT, before)


def _pooled(
    units: Sequence[Unit], task: Callable[[Unit], Result], context: WorkContext | None, workers: int
) -> Iterator[tuple[int, Result]]:
    # Each worker is one thread; the tokenizers' own thread pools would only get in each other's way.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pool = ProcessPoolExecutor(
        min(workers, len(units)), multiprocessing.get_context("spawn"), initializer=_start, initargs=(context,)
    )
    # Large units first keep all cores busy to the end; at most a few wait in the queue, for a quick stop.
    waiting = sorted(range(len(units)), key=lambda number: -units[number].size)[::-1]
    running: dict[Future[Result], int] = {}
    with _interrupt_when_asked() as ask:
        try:
            while waiting or running:
                ask()
                while waiting and len(running) < 2 * workers:
                    number = waiting.pop()
                    running[pool.submit(task, units[number])] = number
                done, _ = wait(running, timeout=_ASK_EVERY, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise SetupError(
                "a worker process died: out of memory, or killed from outside",
                remedy="run the same command again (it goes on), with a smaller --preprocessing_num_workers",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
