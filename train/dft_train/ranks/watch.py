"""The death of one rank is the end of all, soon, with its own error shown. Used by `trainer` around a whole run.

A rank that waits in a collective for a dead one would wait until the process group's time-out. So every rank keeps a
TCP connection to rank 0 from the moment the group exists. The kernel closes a dead process's sockets, so an end of file
without a goodbye is a death, whatever its cause, and a rank that is only slow is never taken for dead. A rank that
fails says so, in one line, before it leaves. The first end that rank 0 learns of is everybody's verdict: each rank
has `GRACE_SECONDS` to leave by itself, then a thread ends the process, though the main thread be stuck in a collective.

Where one rank fails, the others fail after it (gloo: "connection closed by peer"): those errors are not shown.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from dft_common import logs
from dft_common.errors import EXIT_INTERRUPTED, DftError
from dft_train.ranks.launch import have_met, leave_ranks, local_world_size, report_to_launcher
from dft_train.ranks.watch_sockets import CONNECT_SECONDS, Place, admit, connect, listen

GRACE_SECONDS = 10.0
"""How long a rank may take to leave by itself once another has ended."""
NEWS_SECONDS = 1.5
"""How long an unexpected error waits for the news that another rank's end has caused it."""
_STORE_KEY = "dft/watch"
KILLED = "killed, or its machine was lost (when memory runs out the kernel kills a process, and `dmesg` tells)"
GO_ON = "the same command with --resume_from_checkpoint True goes on from the last whole checkpoint, if there is one"


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a rank ended."""

    rank: int
    code: int
    message: str
    """One line."""
    told: bool
    """Whether the rank shows its error itself."""


class _Note(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line between rank 0 and another rank: its end, or a goodbye."""

    ending: Ending | None = None


def describe(error: BaseException) -> tuple[int, str]:
    """(exit code, one line) of what ends a rank."""
    if isinstance(error, DftError):
        return error.exit_code, error.message
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return code, f"it left with exit code {code}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    lines = str(error).strip().splitlines()
    return 1, f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]


class Ranks:
    """`with Ranks() as ranks:` around a run, and `ranks.watch()` within, once the process group exists.

    An exception that leaves the block becomes SystemExit, without a word, on ranks where another's end came first.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = logs.rank_and_world_size()
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)
        self._peers: dict[int, socket.socket] = {}
        self._verdict: Ending | None = None
        self._known = threading.Event()
        self._leaves = False
        self._listener: socket.socket | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.world_size == 1 or error is None:
            leave_ranks()
            self._say_goodbye()
            return
        code, message = describe(error)
        if not isinstance(error, DftError | SystemExit | KeyboardInterrupt) and self._peers:
            self._known.wait(NEWS_SECONDS)
        ending = Ending(rank=self.rank, code=code, message=message, told=not isinstance(error, SystemExit))
        if self._ends_first(ending):
            report_to_launcher(ending.message)
            return
        assert self._verdict is not None
        self._known.wait(GRACE_SECONDS)
        raise SystemExit(self._verdict.code or 1) from None

    # Connections

    def watch(self) -> None:
        """Connect the ranks. Where that fails (a firewall), they are not watched, and a warning says so."""
        import torch.distributed as dist

        if not have_met() or dist.get_world_size() == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        if self.rank == 0:
            self._listener, place = listen(self.world_size, on_this_node=local_world_size() == self.world_size)
            store.set(_STORE_KEY, msgspec.json.encode(place).decode())
            self._start(self._accept, self._listener, place)
            with self._lock:
                self._came.wait_for(lambda: len(self._peers) == self.world_size - 1, CONNECT_SECONDS)
            return
        place = msgspec.json.decode(store.get(_STORE_KEY), type=Place)
        if (met := connect(place, self.rank)) is None:
            logs.get_logger().warning(
                "rank 0 cannot be reached at %s, port %d: should a rank die, the others only end when a collective "
                "times out (--ddp_timeout)",
                ", ".join(place.hosts),
                place.port,
            )
            return
        connection, lines = met
        self._peers[0] = connection
        self._start(self._follow, 0, lines)

    def _start(self, work: Any, *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, name="watch", daemon=True).start()

    def _accept(self, listener: socket.socket, place: Place) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed: the run is over
            self._start(self._receive, connection, place)

    def _receive(self, connection: socket.socket, place: Place) -> None:
        if (admitted := admit(place, connection)) is None:
            return
        rank, lines = admitted
        with self._lock:
            self._peers[rank] = connection
            self._came.notify()
            verdict = self._verdict
        if verdict is not None:
            _send(connection, _Note(ending=verdict))
        self._follow(rank, lines)

    def _follow(self, peer: int, lines: BinaryIO) -> None:
        """Read `peer`'s notes until it leaves, one way or the other."""
        try:
            for line in lines:
                note = msgspec.json.decode(line, type=_Note)
                if note.ending is None:
                    return
                self._learn(note.ending)
        except (OSError, ValueError):
            pass  # the same as an end of file
        if not self._leaves:
            self._learn(Ending(rank=peer, code=1, message=KILLED, told=False))

    # Endings

    def _learn(self, ending: Ending) -> None:
        """Take `ending` for the verdict if it is the first, tell it, and see to it that this process ends too."""
        with self._lock:
            if self._verdict is not None:
                return
            self._verdict = ending
            peers = list(self._peers.values()) if self.rank == 0 else []
        for connection in peers:
            _send(connection, _Note(ending=ending))
        if self._speaks(ending):
            logs.get_logger().error("rank %d ended: %s\n  what to do: %s", ending.rank, ending.message, GO_ON)
        self._known.set()  # only now: it lets the main thread leave, and the process must not end before it has spoken
        self._start(_end_process, ending.code or 1)

    def _speaks(self, ending: Ending) -> bool:
        """Whether this rank is to tell of another's end: one on each node, where it does not do so itself."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        first = self.rank - local_rank
        if first <= ending.rank < first + local_world_size() and ending.told:
            return False
        return local_rank == (1 if ending.rank == first else 0)

    def _ends_first(self, ending: Ending) -> bool:
        """Tell of this rank's end; whether it is the one to be shown."""
        if not self._peers:
            return True  # the ranks have not met
        if self.rank == 0:
            self._learn(ending)
        elif self._verdict is None:
            _send(self._peers[0], _Note(ending=ending))
            if not self._known.wait(NEWS_SECONDS):
                self._learn(ending)
        return self._verdict is None or self._verdict.rank == self.rank

    def _say_goodbye(self) -> None:
        self._leaves = True
        for connection in list(self._peers.values()):
            _send(connection, _Note())
        if self._listener is not None:
            self._listener.close()


def _send(connection: socket.socket, note: _Note) -> None:
    with contextlib.suppress(OSError):  # it has ended too
        connection.sendall(msgspec.json.encode(note) + b"\n")


def _end_process(code: int) -> None:
    threading.Event().wait(GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
