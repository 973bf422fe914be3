"""SIGTERM and SIGUSR1 (Slurm's warning) end a run at a step's end, with a checkpoint. Used by `trainer` around a run.

Before the first step there is nothing to save, and the signal ends the process where it is. From then on a handler
only takes note: `faults` asks all ranks at every step whether any was told to stop. A thread reads the same signals
from a file descriptor, because a handler of Python has to wait for the main thread, which may be stuck in a
collective: a second SIGTERM, and a start that does not end by itself, end the process from there. SIGINT is
Python's own KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from dft_common import logs
from dft_train.ranks.launch import EXIT_TERMINATED

CAUGHT = (signal.SIGTERM, signal.SIGUSR1)
REPEAT_SECONDS = 3.0
"""SIGTERM again within this time is the same one: Slurm and a launcher may both send it to a rank."""
START_SECONDS = 5.0
"""How long a process that has not begun to train may take to end by itself."""


class Stopped(SystemExit):
    """A signal came before the first step."""

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_TERMINATED)
        self.name = signal.Signals(number).name


class Signals:
    """`with Signals() as signals:` in the main thread; elsewhere it catches nothing. What was there comes back."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal that has come."""
        self._starting = True
        self._before: dict[int, Any] = {}
        self._fd_before = -1
        self._hook_before = sys.unraisablehook
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._over = threading.Event()

    @property
    def name(self) -> str:
        return "a signal to another rank" if self.number is None else signal.Signals(self.number).name

    def began(self) -> None:
        """The first step is about to be trained: from here on there is something to save."""
        self._starting = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._ends = socket.socketpair()
            for end in self._ends:
                end.setblocking(False)
            self._before = {number: signal.signal(number, self._note) for number in CAUGHT}
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._raise_again
            self._fd_before = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._follow, args=(self._ends[0],), name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._ends is None:
            return
        signal.set_wakeup_fd(self._fd_before)
        sys.unraisablehook = self._hook_before
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # The thread reads an end of file.
        self._ends[1].close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            if self._starting:
                raise Stopped(number)

    def _raise_again(self, swallowed: sys.UnraisableHookArgs) -> None:
        """A handler that runs within a `__del__` or a callback of C raises in vain: Python would show a traceback
        there, and go on."""
        if not isinstance(swallowed.exc_value, Stopped) or self.number is None:
            self._hook_before(swallowed)
            return
        number, self.number = self.number, None
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    def _follow(self, end: socket.socket) -> None:
        """The thread: reads the numbers of all signals that come, one byte each."""
        end.setblocking(True)
        first = None
        with end:
            while numbers := end.recv(64):
                for number in numbers:
                    if number not in CAUGHT:
                        continue
                    now = time.monotonic()
                    if first is None:
                        first = now
                        if self._starting:
                            threading.Thread(target=self._end_start, daemon=True).start()
                    elif number == signal.SIGTERM and now - first > REPEAT_SECONDS:
                        _leave("SIGTERM again: ending at once, without a checkpoint of this step")

    def _end_start(self) -> None:
        if not self._over.wait(START_SECONDS) and self._starting:
            _leave("stopped by a signal before the first step: nothing to save")


def _leave(message: str) -> None:
    logs.get_logger().warning(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_TERMINATED)


def spare_worker(worker_id: int) -> None:
    """In a DataLoader's process: let only the rank that started it end it.

    Slurm and DeepSpeed's launcher signal every process of a job. Without its workers a rank could not finish the
    step that it is to save.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()
    # Blocked before the thread starts, which inherits that: so no thread is interrupted, and this one may wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)

    def wait() -> None:
        while signal.sigwaitinfo(CAUGHT).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()
