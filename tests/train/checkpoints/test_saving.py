"""A disk that is full costs a checkpoint, never the run, and never a checkpoint that was there."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dft_train.checkpoints.whole import checkpoints_in, what_is_damaged, what_is_missing
from train import handmade

FLAGS = ("--learning_rate", 3e-3, "--logging_steps", 2, "--save_steps", 1, "--per_device_train_batch_size", 2)
WARNING = "the checkpoint was not written, training goes on without it"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes, where this process may."""
    mounted = []

    def mount(size: int) -> Path:
        directory = tmp_path / "disk"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system takes root")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)


def whole_steps(run: Path) -> list[int]:
    """The steps of the checkpoints, of which each is whole."""
    found = checkpoints_in(run)
    assert all(what_is_missing(path) is None and what_is_damaged(path) is None for path in found)
    assert not list(run.glob(".saving-*")) and not list(run.glob(".removing-*"))
    return [int(path.name.partition("-")[2]) for path in found]


@pytest.fixture(scope="module")
def sizes(tmp_path_factory, dataset, qwen3) -> tuple[int, int]:
    """Bytes of (a checkpoint of one rank, its largest file)."""
    from dft_train.cli import main

    run = tmp_path_factory.mktemp("sizes")
    flags = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, *FLAGS, "--output_dir", run, "--max_steps", 1)
    assert main([str(word) for word in flags]) == 0
    files = [path.stat().st_size for path in (run / "checkpoint-1").iterdir()]
    return sum(files), max(files)


def test_one_that_cannot_be_written_is_tried_again_at_the_next(
    sizes, dataset, qwen3, train_here, tmp_path, monkeypatch
):
    """By a limit on the size of files, which any user can set: it holds while steps 2 and 3 are saved."""
    from dft_train.checkpoints import checkpointed, saving

    real = saving.save_checkpoint
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(trainer, state):
        limit = sizes[1] // 2 if trainer.state.global_step in (2, 3) else unlimited[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            return real(trainer, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    monkeypatch.setattr(checkpointed.saving, "save_checkpoint", limited)
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, *FLAGS, "--output_dir", tmp_path, "--max_steps", 4,
        "--save_total_limit", 2,
    )  # fmt: skip
    assert code == 0 and error.count(WARNING) == 2
    assert "saved " + str(tmp_path / "checkpoint-3") not in error
    assert whole_steps(tmp_path) == [1, 4]
    assert (tmp_path / "model.safetensors").is_file()


def test_a_full_disk_does_not_end_a_run_of_one_rank(sizes, small_disk, dataset, qwen3, train_here):
    disk = small_disk(int(2.6 * sizes[0]) + 200_000)
    run = disk / "run"
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, *FLAGS, "--output_dir", run, "--max_steps", 4
    )
    assert error.count(WARNING) == 2 and f"the last whole checkpoint is {run}/checkpoint-2" in error
    assert "--save_total_limit 2, or --save_only_model True" in error
    assert whole_steps(run) == [1, 2]
    assert len([line for line in handmade.read_state(run / "checkpoint-2")["log_history"] if "loss" in line]) == 1
    assert code == 0 and handmade.read_state(run)["global_step"] == 4


def test_a_final_model_that_cannot_be_written_is_an_error_and_leaves_what_was_there(
    sizes, small_disk, dataset, qwen3, train_here
):
    disk = small_disk(sizes[0] + 300_000)
    run = disk / "run"
    common = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, *FLAGS, "--output_dir", run)
    assert train_here(*common, "--save_strategy", "no", "--max_steps", 1)[0] == 0
    before = (run / "model.safetensors").read_bytes()
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - len(before) // 2))
    code, error = train_here(*common, "--save_strategy", "no", "--max_steps", 2)
    assert code == 1 and "the final model could not be saved" in error and "there is no whole checkpoint yet" in error
    assert (run / "model.safetensors").read_bytes() == before
    assert handmade.read_state(run)["global_step"] == 1
    filler.unlink()
    assert train_here(*common, "--save_strategy", "no", "--max_steps", 2)[0] == 0
    assert (run / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("room", "code"), [pytest.param(0.5, 1, id="weights", marks=pytest.mark.slow), pytest.param(2.2, 0, id="states")]
)
def test_a_rank_of_zero3_that_cannot_write_takes_no_other_with_it(
    room, code, zero3_float32, small_disk, dataset, qwen3, ranks
):
    """The weights do not fit, or they do and a rank fails within DeepSpeed's save, where others wait behind it."""
    weights = (qwen3 / "model.safetensors").stat().st_size
    run = small_disk(int(room * weights) + 60_000) / "run"
    done = ranks(
        2, "--dataset_dir", dataset, "--model_name_or_path", qwen3, *FLAGS, "--deepspeed", zero3_float32,
        "--torch_dtype", "float32", "--output_dir", run, "--max_steps", 2, check=code,
    )  # fmt: skip
    assert done[0].stderr.count(WARNING) == 2 and WARNING not in done[1].stderr
    assert "there is no whole checkpoint yet" in done[0].stderr
    assert whole_steps(run) == []
    assert (run / "model.safetensors").is_file() == (code == 0)
    # An error of all ranks is shown once, by whichever comes to it first.
    assert sum(rank.stderr.count("the final model could not be saved") for rank in done) == code


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_outlives_the_limit(limit, dataset, qwen3, train_here, tmp_path):
    """Where more is asked to be better of a loss that falls, the best is the oldest."""
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, *FLAGS, "--output_dir", tmp_path, "--max_steps", 4,
        "--eval_strategy", "steps", "--eval_steps", 1, "--load_best_model_at_end", "True", "--save_total_limit", limit,
        "--metric_for_best_model", "eval_ce_loss", "--greater_is_better", "True",
    )  # fmt: skip
    assert code == 0, error
    state = handmade.read_state(tmp_path)
    losses = {line["step"]: line["eval_ce_loss"] for line in state["log_history"] if "eval_ce_loss" in line}
    best = max(losses, key=losses.__getitem__)
    assert best < 3
    # Of a finished run with a limit of one, transformers leaves the best alone.
    assert whole_steps(tmp_path) == ([best] if limit == 1 else [best, 4])
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    final, kept = tmp_path / "model.safetensors", tmp_path / f"checkpoint-{best}" / "model.safetensors"
    assert final.read_bytes() == kept.read_bytes()
