"""Run work units: in this process, or in a pool of processes. The result does not depend on which.

Called by `build` and `validate.command`. What a unit yields comes while it is worked on, in its order; units themselves
take turns as they finish.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from dft_common.errors import SetupError
from dft_prep.sources.units import Unit, unit_fingerprint

Work = Callable[[Unit], Iterable[Any]]
"""Yields what it has to say of a unit."""


class Job(Protocol):
    """What the pool does. Sent to each worker once, so it must pickle."""

    def start(self) -> Work:
        """Get ready, in the process that does the work."""
        ...


_POOL_FROM_BYTES = 8_000_000
"""Below this, starting a pool takes longer than the work."""

_ASK_EVERY = 0.2  # seconds: how long Ctrl-C may wait to be seen

_work: Work | None = None
_outbox: Any = None


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


def _start(job: Job, outbox: Any) -> None:
    global _work, _outbox
    # Ctrl-C reaches every process of the terminal; the parent alone answers it, and lets running units finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    # Records make millions of objects and hardly a cycle: the collector's frequent passes would only cost time.
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    _work, _outbox = job.start(), outbox


def _run_in_pool(number: int, unit: Unit) -> None:
    assert _work is not None
    for message in _work(unit):
        _outbox.put((number, message))


def run_units(
    units: Sequence[Unit],
    job: Job,
    workers: int,
    *,
    work: Work | None = None,
    in_order: bool = False,
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Any]]:
    """(number of the unit, what it yields).

    work: a job that was started in this process already, used where there is no pool. in_order: begin the units in
    their order; else the large ones first, which keeps all cores busy to the end. enough: asked before each unit; when
    it says so, no further one is begun.
    """
    if use_pool(units, workers):
        yield from _pooled(units, job, workers, in_order, enough)
        return
    work = work or job.start()
    for number, unit in enumerate(units):
        if enough():
            return
        for message in work(unit):
            yield number, message


class _Fingerprints:
    def start(self) -> Work:
        return lambda unit: [unit_fingerprint(unit)]


def fingerprint_units(units: Sequence[Unit], workers: int) -> list[str]:
    """The fingerprint of every unit, in order: what tells whether a source has changed."""
    found = dict(run_units(units, _Fingerprints(), workers))
    return [found[number] for number in range(len(units))]


def use_pool(units: Sequence[Unit], workers: int) -> bool:
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
    units: Sequence[Unit], job: Job, workers: int, in_order: bool, enough: Callable[[], bool]
) -> Iterator[tuple[int, Any]]:
    # Each worker is one thread; the tokenizers' own thread pools would only get in each other's way.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("spawn")
    inbox = _Inbox(context.SimpleQueue())
    pool = ProcessPoolExecutor(min(workers, len(units)), context, initializer=_start, initargs=(job, inbox.pipe))
    waiting = list(reversed(range(len(units))))
    if not in_order:
        waiting.sort(key=lambda number: units[number].size)
    # At most a few wait in the pool's queue, for a quick stop.
    running: set[Future[None]] = set()
    with _interrupt_when_asked() as ask:
        try:
            while waiting or running:
                ask()
                if enough():
                    waiting.clear()
                while waiting and len(running) < 2 * workers:
                    number = waiting.pop()
                    running.add(pool.submit(_run_in_pool, number, units[number]))
                done, running = wait(running, timeout=_ASK_EVERY, return_when=FIRST_COMPLETED)
                yield from inbox.arrived()
                for future in done:
                    future.result()
            yield from inbox.rest()
        except BrokenProcessPool:
            raise SetupError(
                "a worker process died: out of memory, or killed from outside",
                remedy="run the same command again (a build goes on), with a smaller --preprocessing_num_workers",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Inbox:
    """What the workers send. A thread empties the pipe, so that no worker waits for the parent."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while (message := self.pipe.get()) is not None:
            self._messages.put(message)

    def arrived(self) -> Iterator[Any]:
        """What has come so far."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._messages.get_nowait()

    def rest(self) -> Iterator[Any]:
        """All that is still to come, when every worker has finished."""
        self.pipe.put(None)
        self._thread.join()
        yield from self.arrived()
