"""One rank's end, whatever its cause, ends all ranks soon, and its own error is the one that is shown."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dft_train.ranks import launch, watch_sockets
from train import meeting

SOON = 20.0
"""Far below the half hour of a collective's time-out; the machine of the tests may be busy."""


@pytest.fixture(scope="module")
def ended(once) -> dict[str, list[tuple[int, float, str]]]:
    """For each case of `meeting`: (exit code, seconds after the first end, stderr) by rank."""

    def meet(directory: Path) -> Any:
        command = [sys.executable, meeting.__file__, *meeting.CASES]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=True)
        return json.loads(done.stdout)

    return {case: [tuple(rank) for rank in ranks] for case, ranks in once("ended", meet).items()}


def codes(ranks: list[tuple[int, float, str]]) -> list[int]:
    return [code for code, _, _ in ranks]


def spoken(ranks: list[tuple[int, float, str]]) -> dict[int, str]:
    return {rank: text for rank, (_, _, text) in enumerate(ranks) if text}


@pytest.mark.parametrize(("dead", "speaker"), [(0, 1), (2, 0)])
def test_a_killed_rank_ends_those_that_wait_elsewhere_and_one_of_them_tells(ended, dead, speaker):
    ranks = ended[f"kill-{dead}"]
    assert codes(ranks) == [-9 if rank == dead else 1 for rank in range(3)]
    assert max(seconds for _, seconds, _ in ranks) < SOON
    (told,) = spoken(ranks).items()
    assert told[0] == speaker and f"rank {dead} ended: killed" in told[1] and "--resume_from_checkpoint" in told[1]


@pytest.mark.parametrize(
    ("case", "rank", "text"),
    [
        ("error-0", 0, "ValueError: the cat"),
        ("error-1", 1, "error: the dog"),
        ("collective-0", 0, "ValueError: the cat"),
        ("collective-1", 1, "ValueError: the cat"),
    ],
)
def test_an_error_ends_all_and_only_the_rank_that_has_it_shows_one(ended, case, rank, text):
    assert codes(ended[case]) == [1, 1, 1]
    assert max(seconds for _, seconds, _ in ended[case]) < SOON
    (told,) = spoken(ended[case]).items()
    assert told[0] == rank and text in told[1]


@pytest.mark.parametrize("case", ["collective-kill", "collective-kill-slow-to-speak"])
def test_collectives_that_break_because_a_rank_was_killed_are_not_shown(ended, case):
    assert codes(ended[case]) == [1, -9, 1]
    (told,) = spoken(ended[case]).items()
    assert told[0] == 0 and "rank 1 ended: killed" in told[1] and "Traceback" not in told[1]


def test_leaving_in_the_middle_is_an_end_too(ended):
    assert codes(ended["exit-1"]) == [1, 0, 1]
    assert list(spoken(ended["exit-1"])) == [0]
    assert "rank 1 ended: it left with exit code 0" in ended["exit-1"][0][2]


def test_an_error_of_all_is_shown_once(ended):
    assert codes(ended["alike"]) == [1, 1, 1]
    (text,) = spoken(ended["alike"]).values()
    assert text.startswith("error: the same for all\n")


@pytest.mark.parametrize("case", ["end-0-first", "end-0-last"])
def test_a_rank_that_is_done_before_the_others_ends_nobody(ended, case):
    assert codes(ended[case]) == [0, 0, 0]
    assert spoken(ended[case]) == {}


def test_the_error_is_left_where_torchrun_looks_for_it(tmp_path, monkeypatch):
    """In the form that torch itself reads."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "error.json"))
    launch.report_to_launcher("the cat sat")
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert isinstance(failure.message, dict) and failure.message["message"] == "the cat sat"
    assert abs(failure.timestamp - time.time()) < 60


@pytest.mark.parametrize("on_this_node", [True, False])
def test_only_who_knows_the_token_is_let_in(monkeypatch, on_this_node):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    listener, place = watch_sockets.listen(2, on_this_node=on_this_node)
    port = listener.getsockname()[1]
    with listener, socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"0" * 32 + b" 1\n")
        connection, _ = listener.accept()
        assert watch_sockets.admit(place, connection) is None
        assert stranger.recv(1) == b""
    assert watch_sockets.connect(place, 1) is None


def test_who_does_not_know_the_answer_is_not_taken_for_rank_0():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        place = watch_sockets.Place(hosts=["127.0.0.1"], port=port, token="a", answer="b")

        def accept() -> None:
            connection, _ = other.accept()
            connection.sendall(b"hello\n")
            connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        assert watch_sockets.connect(place, 1) is None
        thread.join()


def wait_for(rank, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in rank.stderr:
        assert rank.returncode is None and time.monotonic() < deadline, rank.stderr
        time.sleep(0.05)


def endless(dataset: Path, model: Path, run: Path) -> tuple[object, ...]:
    return (
        "--dataset_dir", dataset, "--model_name_or_path", model, "--output_dir", run, "--max_steps", 100000,
        "--logging_steps", 1, "--save_strategy", "no",
    )  # fmt: skip


def test_kill_9_of_a_training_rank_ends_the_other(ranks, dataset, qwen3, tmp_path):
    started = ranks.start(2, *endless(dataset, qwen3, tmp_path / "run"))
    wait_for(started[0], "step 2/")
    started[1].send(signal.SIGKILL)
    killed = time.monotonic()
    ranks.wait(started)
    assert time.monotonic() - killed < SOON
    assert [rank.returncode for rank in started] == [1, -9]
    assert "error: rank 1 ended: killed" in started[0].stderr and "Traceback" not in started[0].stderr


KILLER = """
import os, signal, threading, time
def kill():
    while not os.path.exists({journal!r}):
        time.sleep(0.1)
    open({when!r}, "w").write(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("RANK") == "1":
    threading.Thread(target=kill, daemon=True).start()
"""


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_ends_the_other(dataset, qwen3, tmp_path, launch):
    """Rank 1 is killed once the first step is logged."""
    run, when = tmp_path / "run", tmp_path / "when"
    text = KILLER.format(journal=str(run / "metrics.jsonl"), when=str(when))
    (tmp_path / "sitecustomize.py").write_text(text)
    flags = endless(dataset, qwen3, run)
    done = launch("torchrun", 2, *flags, env={"PYTHONPATH": str(tmp_path)}, check=None)
    assert time.time() - float(when.read_text()) < 30
    assert done.returncode == 1
    assert "rank 1 ended: killed" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
