"""SIGTERM and SIGUSR1 end a run with a checkpoint that goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dft_train.checkpoints import saving
from dft_train.ranks import signals
from dft_train.ranks.signals import Signals, Stopped
from dft_train.settings import checks
from dft_train.settings.command_line import _launcher, _short, resuming
from train import handmade


def wait_for(path, text, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (path.is_file() and text in path.read_text(errors="replace")):
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.02)


def wait_for_error(rank, text, seconds=60.0):
    deadline = time.monotonic() + seconds
    while True:
        # A process that was only just forked has no output yet.
        with contextlib.suppress(FileNotFoundError):
            if text in rank.stderr:
                return
        assert time.monotonic() < deadline, f"no {text!r}"
        time.sleep(0.02)


def signal_when(path, text, number=signal.SIGTERM):
    """Signals this very process once `text` stands in `path`."""

    def work():
        wait_for(path, text)
        os.kill(os.getpid(), number)

    threading.Thread(target=work, daemon=True).start()


@pytest.fixture(scope="module")
def common(qwen3, dataset):
    return "--model_name_or_path", qwen3, "--dataset_dir", dataset, "--learning_rate", "1e-2"


@pytest.mark.parametrize("strategy", ["no", pytest.param("steps", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(tmp_path, train_here, common, strategy):
    flags = (*common, "--max_steps", 60, "--logging_steps", 1, "--save_strategy", strategy, "--save_steps", 1000)
    run, straight = tmp_path / "run", tmp_path / "straight"
    signal_when(run / "metrics.jsonl", '"step": 10')
    code, error = train_here(*flags, "--output_dir", run)
    assert code == 143, error
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert 10 <= step < 60
    assert error.count("stopped at step") == error.count(f"saved {checkpoint}\n") == 1
    assert not (run / "model.safetensors").exists()
    assert train_here(*flags, "--output_dir", run, "--resume_from_checkpoint", "True")[0] == 0
    assert train_here(*flags, "--output_dir", straight)[0] == 0
    once, twice = (load_file(path / "model.safetensors") for path in (straight, run))
    assert all(once[name].equal(twice[name]) for name in once)
    losses = [
        [line["loss"] for line in handmade.read_state(path)["log_history"] if "loss" in line]
        for path in (straight, run)
    ]
    assert losses[0] == losses[1]


def test_all_ranks_stop_where_one_was_signalled(tmp_path, ranks, common):
    run = tmp_path / "run"
    flags = ("--max_steps", 100000, "--logging_steps", 1, "--save_strategy", "no", "--output_dir", run)
    started = ranks.start(2, *common, *flags)
    wait_for_error(started[0], "step 3/")
    started[1].send(signal.SIGUSR1)
    done = ranks.wait(started)
    assert [rank.returncode for rank in done] == [143, 143]
    assert len(list(run.glob("checkpoint-*"))) == 1
    assert done[0].stderr.count("To go on:") == 1 and "To go on" not in done[1].stderr
    assert "--resume_from_checkpoint True" in done[0].stderr
    assert not any("Traceback" in rank.stderr for rank in done)


def test_an_evaluation_is_left_in_the_middle_by_all_ranks(tmp_path, ranks, qwen3, tokenizer):
    train, many = handmade.conversations(tokenizer, 20), handmade.conversations(tokenizer, 3000, seed=1)
    data, run = handmade.write_dataset(tmp_path / "data", train, many), tmp_path / "run"
    flags = ("--max_steps", 100000, "--logging_steps", 3, "--eval_strategy", "steps", "--eval_steps", 3)
    model = ("--model_name_or_path", qwen3, "--dataset_dir", data, "--output_dir", run)
    started = ranks.start(2, *model, *flags)
    wait_for_error(started[0], "step 3/")
    started[1].send(signal.SIGTERM)
    done = ranks.wait(started)
    assert [rank.returncode for rank in done] == [143, 143]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert "eval_loss" not in (run / "metrics.jsonl").read_text()
    assert done[0].stderr.count(f"saved {run}/checkpoint-3\n") == 1


def test_a_checkpoint_without_optimizer_is_saved_and_said_to_be_one(tmp_path, train_here, common):
    run = tmp_path / "run"
    signal_when(run / "metrics.jsonl", '"step": 2')
    flags = ("--max_steps", 100000, "--logging_steps", 1, "--save_only_model", "True", "--output_dir", run)
    code, error = train_here(*common, *flags)
    assert code == 143
    assert "cannot be resumed" in error and f"--model_name_or_path {run}/checkpoint-" in error
    assert "To go on" not in error


@pytest.mark.parametrize("only_model", ["False", "True"])
def test_where_nothing_could_be_saved_no_checkpoint_is_promised(tmp_path, train_here, common, monkeypatch, only_model):
    run = tmp_path / "run"
    monkeypatch.setattr(saving, "_write_all", lambda *_: os.strerror(errno.ENOSPC))
    signal_when(run / "metrics.jsonl", '"step": 2')
    flags = ("--max_steps", 100000, "--logging_steps", 1, "--save_only_model", only_model, "--output_dir", run)
    code, error = train_here(*common, *flags)
    assert code == 143
    assert "could not be written, and there is no other. The run starts anew" in error
    assert "To go on" not in error and "None" not in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_the_first_step_there_is_nothing_to_save(tmp_path, train_here, common, monkeypatch, number):
    load = checks.load_config

    def signalled(settings):
        os.kill(os.getpid(), number)
        return load(settings)

    monkeypatch.setattr(checks, "load_config", signalled)
    before = [signal.getsignal(each) for each in signals.CAUGHT]
    code, error = train_here(*common, "--output_dir", tmp_path / "run")
    assert code == 143
    assert f"{signal.Signals(number).name} before the first step: nothing is saved" in error
    assert [signal.getsignal(each) for each in signals.CAUGHT] == before


def test_ctrl_c_is_no_traceback(tmp_path, ranks, common):
    flags = ("--max_steps", 100000, "--logging_steps", 1, "--output_dir", tmp_path / "run")
    started = ranks.start(1, *common, *flags)
    wait_for_error(started[0], "step 2/")
    started[0].send(signal.SIGINT)
    (done,) = ranks.wait(started)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr


def test_what_was_caught_before_is_caught_again():
    before = [signal.getsignal(number) for number in signals.CAUGHT]
    with Signals() as caught:
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1)
        assert stopped.value.code == 143 and stopped.value.name == "SIGUSR1"
        caught.began()
    assert [signal.getsignal(number) for number in signals.CAUGHT] == before


def test_a_signal_that_a_finalizer_swallows_comes_again(capfd):
    class Closing:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    before = sys.unraisablehook
    with Signals():
        one = Closing()
        with pytest.raises(Stopped) as stopped:
            del one
            time.sleep(10)
    assert stopped.value.name == "SIGTERM" and sys.unraisablehook is before
    assert "Traceback" not in capfd.readouterr().err


STUCK = """
import ctypes, sys
from dft_train.ranks import signals
signals.REPEAT_SECONDS, signals.START_SECONDS = 0.2, 0.2
with signals.Signals() as caught:
    if sys.argv[1] == "trains":
        caught.began()
    lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    print("ready", flush=True)
    # As in a collective: it waits in C, goes on waiting when a signal comes, and no handler of Python's runs.
    library.pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize("state", ["starts", "trains"])
def test_a_process_that_is_stuck_in_c_can_be_ended(state):
    process = subprocess.Popen([sys.executable, "-c", STUCK, state], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    if state == "trains":
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


def test_only_its_rank_ends_a_worker():
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        signals.spare_worker(0)
        os.write(tell, b".")
        time.sleep(60)
        os._exit(7)
    os.read(ready, 1)
    subprocess.run(["kill", "-TERM", str(pid)], check=True)
    subprocess.run(["kill", "-USR1", str(pid)], check=True)
    time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_command_is_the_users_own():
    own = ["--output_dir", "a b", "--bf16", "True"]
    python = ["/venv/bin/python", "-u", "-m", "dft_train"]
    launcher = ["/venv/bin/python", "/venv/bin/torchrun", "--nproc_per_node=2", "-m", "dft_train"]
    shell = ["bash", "train.sh"]
    assert _launcher([[*python, *own], [*launcher, *own], shell, ["bash", "x", *own]], own) == launcher
    assert _launcher([["python", "server.py"], shell], own) == ["dft-train"]
    name = Path(sys.executable).parent / "torchrun"
    assert _short([sys.executable, str(name), "-m", "x"]) in (
        ["torchrun", "-m", "x"],
        [sys.executable, str(name), "-m", "x"],
    )


def test_the_flag_to_resume_is_there_once():
    end = ["--resume_from_checkpoint", "True"]
    assert resuming(["--a", "1"]) == ["--a", "1", *end]
    assert resuming(["--resume_from_checkpoint", "x/checkpoint-3", "--a", "1"]) == ["--a", "1", *end]
    assert resuming(["--resume-from-checkpoint=x", "--a", "1"]) == ["--a", "1", *end]
