"""`--data_files`: rank 0 builds, the others wait; stale and dead status files; exit codes pass through."""

from __future__ import annotations

import contextlib
import dataclasses
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
from dft_common.manifest import encode_json, write_atomically
from dft_train import bridge
from dft_train.ranks.signals import Signals, Stopped
from dft_train.settings.arguments import make_settings
from train import handmade


@pytest.fixture
def settings(tmp_path):
    from dft_train.settings.arguments import STATIC_FLAGS

    values = {flag.name: flag.default for flag in STATIC_FLAGS}
    given = {"data_files": ("a.jsonl", {"name": "b", "path": "b.json"}), "model_name_or_path": "m", "max_length": 128}
    values |= {**given, "output_dir": str(tmp_path / "run")}
    return make_settings(values, given, frozenset())


def test_the_command_has_the_flags_that_were_given_and_no_others(settings):
    command = bridge.build_command(settings)[1:]
    assert command[:3] == ["-m", "dft_prep", "build"]
    assert command[3:6] == ["--data_files", "a.jsonl", "b=b.json"]
    out = settings.output_dir / "dataset"
    assert sorted(command[6:]) == sorted(["--tokenizer=m", "--max_length=128", f"--output_dir={out}"])
    other = dataclasses.replace(settings, build={**settings.build, "tokenizer": "t", "deduplicate": False})
    assert {"--tokenizer=t", "--deduplicate=False"} <= set(bridge.build_command(other))


def test_a_source_that_asks_for_more_is_refused(settings):
    more = {**settings.build, "data_files": ({"path": "a", "weight": 2},)}
    with pytest.raises(SetupError, match="weight cannot be handed on"):
        bridge.build_command(dataclasses.replace(settings, build=more))


@pytest.fixture
def status(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(bridge, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(bridge, "START_SECONDS", 1.0)
    return tmp_path / "status.json"


def write(path: Path, state: str, code: int = 0, age: float = 0.0) -> None:
    write_atomically(path, encode_json(bridge.Status(state=state, exit_code=code)))
    os.utime(path, (time.time() - age,) * 2)


def test_the_others_wait_until_it_is_done(status):
    write(status, "building")
    later = threading.Timer(0.6, write, (status, "done"))
    later.start()
    started = time.monotonic()
    assert bridge._wait_for_build(status) == 0
    assert time.monotonic() - started > 0.5


def test_a_failure_is_everybodys(status):
    write(status, "failed", 1)
    assert bridge._wait_for_build(status) == 1


def test_what_an_earlier_run_left_behind_is_not_taken_for_this_one(status):
    write(status, "done", age=30)
    with pytest.raises(SetupError, match="no sign of life"):
        bridge._wait_for_build(status)


def test_a_dead_rank_0_is_given_up(status):
    write(status, "building")
    with pytest.raises(SetupError, match="no sign of life"):
        bridge._wait_for_build(status)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_run_alone_ends_the_build_too(settings, monkeypatch, number):
    started = []

    class Build(subprocess.Popen):
        def __init__(self, command, **kwargs):
            super().__init__([sys.executable, "-c", "import time; time.sleep(600)"], **kwargs)
            started.append(self)

        def wait(self, timeout=None):
            if len(started) == 1:
                started.append(self)
                os.kill(os.getpid(), number)
            return super().wait(timeout)

    monkeypatch.setattr(bridge.subprocess, "Popen", Build)
    with Signals(), contextlib.suppress(Stopped):
        assert bridge._run_build(settings) == 130
    try:
        assert started[0].poll() is not None
    finally:
        started[0].kill()


@pytest.mark.slow
def test_a_failing_build_ends_both_ranks_with_its_exit_code(ranks, qwen3, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n" * 40)
    flags = ("--data_files", tmp_path / "bad.jsonl", "--model_name_or_path", qwen3, "--output_dir", tmp_path / "run")
    ranks(2, *flags, check=1)
    assert not list((tmp_path / "run").glob(".dft-build-*"))


def test_files_become_a_dataset_and_a_run(ranks, qwen3, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": f"{at}+1"}, {"role": "assistant", "content": str(at + 1)}]}
        for at in range(60)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = ranks(
        2, "--data_files", path, "--model_name_or_path", qwen3, "--output_dir", tmp_path / "run",
        "--max_length", 128, "--validation_split_percentage", 20, "--preprocessing_num_workers", 1,
        "--num_train_epochs", 1, "--logging_steps", 1, "--eval_strategy", "epoch",
        "--per_device_train_batch_size", 1, "--save_strategy", "no",
    )  # fmt: skip
    assert "building the dataset" in done[0].stderr
    assert (tmp_path / "run" / "dataset" / "manifest.json").is_file()
    assert not list((tmp_path / "run").glob(".dft-build-*"))
    evals = [line for line in handmade.read_state(tmp_path / "run")["log_history"] if "eval_loss" in line]
    assert len(evals) == 1 and "eval_sums_loss" in evals[0]
