"""Processes that run `dft-train`, forked from one that has imported everything: a rank starts in no time.

Each is a process of its own, as under a launcher: with its environment, its exit code and output, and it can be
killed. Used through the fixture `ranks`; what must be the launcher itself uses the fixture `launch`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Rank:
    """One process. `returncode` is None while it runs, and negative where a signal ended it."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._output = output

    @property
    def stdout(self) -> str:
        return self._output.with_suffix(".out").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._output.with_suffix(".err").read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class RankServer:
    """`start` forks ranks, `wait` waits for them. To be closed."""

    def __init__(self) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._started = 0

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, count: int, *arguments: object, env: dict[str, str] | None = None) -> list[Rank]:
        """`count` ranks of one run, as a launcher starts them; a single one without a launcher's environment."""
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": free_port()}
        started = []
        for rank in range(count):
            self._started += 1
            output = Path(self._folder.name) / str(self._started)
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
            environment = {name: str(value) for name, value in {**own, **(env or {})}.items()}
            words = [str(argument) for argument in arguments]
            pid = self._ask(do="start", arguments=words, environment=environment, output=str(output))
            started.append(Rank(pid, output))
        return started

    def wait(self, ranks: list[Rank], timeout: float = 100) -> list[Rank]:
        """Until all have ended; those that have not in time are killed, and that fails."""
        deadline = time.monotonic() + timeout
        while running := [rank for rank in ranks if rank.returncode is None]:
            for rank in running:
                rank.returncode = self._ask(do="poll", pid=rank.pid)
            if time.monotonic() > deadline:
                for rank in running:
                    rank.send(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s\n" + "\n".join(rank.stderr for rank in ranks))
            time.sleep(0.02)
        return ranks

    def __call__(
        self, count: int, *arguments: object, env: dict[str, str] | None = None, check: int | None = 0
    ) -> list[Rank]:
        """Start, wait, and expect every rank to exit with `check`."""
        done = self.wait(self.start(count, *arguments, env=env))
        if check is not None:
            ends = "\n".join(rank.stderr[-6000:] for rank in done)
            assert {rank.returncode for rank in done} == {check}, f"{[rank.returncode for rank in done]}\n{ends}"
        return done

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


def _become_a_rank(request: dict[str, Any]) -> None:
    """In the child: never returns."""
    import atexit
    import traceback

    code = 1
    try:
        os.environ.update(request["environment"])
        sys.argv[:] = ["dft-train", *request["arguments"]]
        for number, suffix in ((1, ".out"), (2, ".err")):
            descriptor = os.open(request["output"] + suffix, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w")
        from dft_train.cli import main

        code = main(request["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(replies: IO[str]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            reply = os.fork()
            if reply == 0:
                _become_a_rank(request)
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    # What a library prints on import is no reply.
    _replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from dft_train import trainer  # noqa: F401
    from dft_train.ranks import launch

    launch.quieten()
    launch.quieten_transformers()
    import deepspeed  # noqa: F401

    from dft_train import loop  # noqa: F401
    from dft_train.settings import training_arguments  # noqa: F401

    _serve(_replies)
