"""The ranks' meeting: who waits for a rank that never comes, and who tells a mistake that all make."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from torch.distributed import DistNetworkError

from dft_common import logs
from dft_common.errors import SetupError
from dft_train import train_command
from dft_train.ranks import launch

WAITS = """
import sys
import torch.distributed as dist
from dft_train.ranks import launch
launch.MEET_SECONDS = 1.0
with launch.meeting():
    dist.init_process_group("gloo")
"""


@pytest.fixture
def second_of_two(monkeypatch) -> None:
    values = {
        "RANK": 1,
        "LOCAL_RANK": 1,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": launch.free_port(),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_rank_that_never_comes_is_not_waited_for_until_the_collectives_time_out(second_of_two):
    """The main thread waits inside torch; it is ended all the same."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, env=environment, timeout=90)
    assert done.returncode == 2
    assert "rank 1: after 1 s not all of the 2 ranks have come to 127.0.0.1:" in done.stderr
    assert "what to do: see the other ranks' messages" in done.stderr
    assert time.monotonic() - began < 60


def test_a_meeting_that_fails_tells_where_it_was_to_be(second_of_two):
    with pytest.raises(SetupError, match=r"cannot meet at 127.0.0.1:\d+: the port is taken$"), launch.meeting():
        raise DistNetworkError("the port is taken\nand much more")


def test_a_meeting_that_succeeds_ends_nobody_later(second_of_two, monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(launch, "MEET_SECONDS", 0.2)
    monkeypatch.setattr(launch.os, "_exit", ended.append)
    with launch.meeting():
        pass
    time.sleep(0.4)
    assert ended == []


def test_a_mistake_of_all_is_told_by_the_first_of_a_node_alone(monkeypatch, tmp_path):
    """Where nobody else has shown it by then, the rank that has found it does."""
    monkeypatch.setattr(launch, "ALONE_SECONDS", 0.1)
    monkeypatch.delenv(launch.ERROR_FILE, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert train_command._speaks()
    monkeypatch.setenv("LOCAL_RANK", "1")
    began = time.monotonic()
    assert train_command._speaks()
    assert time.monotonic() - began >= 0.1
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "error"))
    assert not train_command._speaks()


@pytest.mark.parametrize(
    ("driver", "visible", "warned"),
    [(True, None, True), (True, "0,1", True), (True, "", False), (False, None, False)],
    ids=["unseen", "unseen-by-number", "hidden", "none"],
)
def test_a_gpu_that_torch_does_not_see_is_told_of(driver, visible, warned, monkeypatch, capsys, tmp_path):
    path = tmp_path / "nvidiactl"
    if driver:
        path.touch()
    monkeypatch.setattr(launch, "_DRIVER", path)
    monkeypatch.setattr(launch, "has_accelerator", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    logs.setup()
    launch.check_devices()
    assert ("has an NVIDIA GPU, which torch" in capsys.readouterr().err) == warned
