"""`--num_gpus N`: what the parent gives its ranks, what it does when one fails, and what becomes of them without it.

Most ranks here are small scripts in place of a training.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dft_common.errors import SetupError
from dft_train.ranks import start as parent
from train import handmade

LAUNCHERS_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS_OWN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a script as ranks: (exit code, stdout, stderr). RANK is the script's `rank`."""
    monkeypatch.setattr(parent, "ALIKE_SECONDS", 0.5)
    monkeypatch.setattr(parent, "TERM_SECONDS", 1.5)

    def run(count: int, script: str) -> tuple[int, str, str]:
        head = "import json, os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        monkeypatch.setattr(parent, "_COMMAND", (sys.executable, "-c", head + script))
        capfd.readouterr()
        code = parent.run_ranks(count, [])
        return code, *capfd.readouterr()

    return run


def test_each_rank_gets_its_environment(run):
    code, out, _ = run(3, "time.sleep(0.2 * rank); print(json.dumps(dict(os.environ)), flush=True)")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in found] == [("0", "0"), ("1", "1"), ("2", "2")]
    shared = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", parent.LAUNCH_ID, "OMP_NUM_THREADS")
    for name in shared:
        assert len({one[name] for one in found}) == 1
    assert (found[0]["WORLD_SIZE"], found[0]["MASTER_ADDR"]) == ("3", "127.0.0.1")


def test_a_rank_that_fails_alone_ends_the_others_and_is_named_last(run):
    script = (
        "if rank == 1:\n"
        "    open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(json.dumps({'message': {'message': 'the cat'}}))\n"
        "    sys.exit(7)\n"
        "time.sleep(60)\n"
    )
    began = time.monotonic()
    code, _, error = run(3, script)
    assert code == 7
    assert error.splitlines()[-1] == "error: rank 1 was the first to end: the cat"
    assert time.monotonic() - began < 20


def test_the_rank_that_says_why_counts_as_the_first(run):
    """Rank 0 breaks because of rank 1, and may be seen first."""
    script = (
        "if rank == 1:\n"
        "    open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(json.dumps({'message': {'message': 'the cat'}}))\n"
        "    sys.exit(2)\n"
        "sys.exit(1)\n"
    )
    for before in ("time.sleep(0.2 * rank)\n", "time.sleep(0.2 * (1 - rank))\n"):
        code, _, error = run(2, before + script)
        assert code == 2 and "the cat" in error


def test_a_killed_rank(run):
    code, _, error = run(2, "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    assert code == 137
    assert "rank 1 was the first to end: ended by SIGKILL (killed; when memory runs out" in error.splitlines()[-1]


def test_an_error_of_all_needs_no_other_word(run):
    assert run(2, "sys.exit(2)") == (2, "", "")


def test_a_rank_that_does_not_end_when_told_is_killed(run):
    script = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(0.3) or sys.exit(1) if rank == 0 else print(os.getpid(), flush=True) or time.sleep(60)"
    )
    code, out, _ = run(2, script)
    assert code == 1
    assert not alive(int(out))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_signals_reach_every_rank_and_their_exit_code_is_the_parents(run, number, code):
    """The second rank takes longer to save than a rank that fails may take."""
    script = f"signal.signal({int(number)}, lambda n, f: (time.sleep(rank), sys.exit({code})))\ntime.sleep(60)\n"
    timer = threading.Timer(1.5, os.kill, (os.getpid(), number))
    timer.start()
    assert run(2, script) == (code, "", "")


def test_no_rank_is_left_behind_where_the_parent_is_killed(tmp_path):
    script = (
        "import os, sys, time\n"
        "sys.path[:] = %r\n"
        "from dft_train.ranks import start as ranks\n"
        "if ranks.started_here():\n"
        "    ranks.follow_parent()\n"
        "    open(%r + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "ranks._COMMAND = (sys.executable, sys.argv[0])\n"
        "ranks.run_ranks(2, [])\n"
    )
    path = tmp_path / "script.py"
    path.write_text(script % (sys.path, str(tmp_path / "pid")))
    process = subprocess.Popen([sys.executable, str(path)])
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    process.kill()
    process.wait()
    pids = [int(file.read_text()) for file in files]
    wait_until(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    """Not ended, nor a zombie that nobody has waited for."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"RANK": "0"}, "RANK=0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "srun"),
    ],
)
def test_another_launcher_is_refused(monkeypatch, environment, found):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=found) as caught:
        parent.run_ranks(2, [])
    assert "leave --num_gpus out" in caught.value.remedy


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    import torch

    from dft_train.ranks import launch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    launch.check_devices()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SetupError, match="4 ranks on a machine where rank 2 sees 2 GPUs"):
        launch.check_devices()


def test_ranks_of_the_command_itself(dataset, qwen3, tmp_path):
    """Two CPU ranks where there is no GPU, as users start them; the flags reach them, `--config` too."""
    run = tmp_path / "run"
    (tmp_path / "flags.yaml").write_text(f"num_gpus: 2\ndataset_dir: {dataset}\nmax_steps: 1\nlogging_steps: 1\n")
    command = [
        sys.executable, "-m", "dft_train", "--config", str(tmp_path / "flags.yaml"), "--model_name_or_path",
        str(qwen3), "--output_dir", str(run), "--save_strategy", "no",
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 packs a step (1 a device x 1 accumulated x 2 ranks)" in done.stderr
    assert handmade.read_state(run)["global_step"] == 1
