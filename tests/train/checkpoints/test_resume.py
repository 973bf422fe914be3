"""A run that goes on is the run that never stopped, bit by bit; on other ranks it sees the same packs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from dft_train.checkpoints.whole import read_contents
from train import handmade
from train.same_run import assert_same_logs, assert_same_run, assert_same_weights, history

# 25 packs, 4 a step: 7 steps an epoch, the last one short; so this goes over into a second epoch.
STEPS = 9
FLAGS = (
    "--max_steps", STEPS, "--logging_steps", 2, "--learning_rate", 3e-3, "--adam_epsilon", 1e-4, "--save_steps", 3,
    "--eval_strategy", "steps", "--eval_steps", 4, "--lr_scheduler_type", "cosine", "--warmup_ratio", 0.2,
)  # fmt: skip
EXACT = ("model.safetensors", "optimizer.pt", "scheduler.pt", "optim_states.pt", "rng_state")


@pytest.fixture(scope="module")
def dropout(tmp_path_factory) -> Path:
    """A model whose training draws random numbers at every step."""
    return handmade.write_model(tmp_path_factory.mktemp("dropout") / "qwen3", "qwen3", attention_dropout=0.2)


def assert_bit_identical(run: Path, other: Path, step: int = STEPS) -> None:
    """Logs and weights; and at `step` the optimizer's, the scheduler's and the random states, by their hashes."""
    assert_same_logs(run, other, rel=0, resumed=True)
    assert_same_weights(run, other, tolerance=0)
    ours, theirs = (read_contents(path / f"checkpoint-{step}") for path in (run, other))
    assert ours is not None and theirs is not None and ours.files.keys() == theirs.files.keys()
    states = [name for name in ours.files if any(part in name for part in EXACT)]
    assert len(states) >= 4
    assert {name: ours.files[name] for name in states} == {name: theirs.files[name] for name in states}


def take_up(run: Path, step: int, into: Path) -> Path:
    """A run's directory as it was when it stopped at `step`."""
    into.mkdir(parents=True)
    shutil.copytree(run / f"checkpoint-{step}", into / f"checkpoint-{step}")
    return into


# One rank


@pytest.fixture(scope="module")
def accumulating(tmp_path_factory, dataset, dropout) -> tuple[Path, tuple]:
    """(run, its flags): micro-batches of one pack, read by two processes; evaluated and saved at odd moments."""
    from dft_train.cli import main

    run = tmp_path_factory.mktemp("accumulating") / "run"
    flags = (
        "--dataset_dir", dataset, "--model_name_or_path", dropout, *FLAGS, "--gradient_accumulation_steps", 4,
        "--dataloader_num_workers", 2, "--save_steps", 1, "--eval_steps", 5,
    )  # fmt: skip
    assert main([str(word) for word in (*flags, "--output_dir", run)]) == 0
    return run, flags


@pytest.mark.parametrize(
    "step", [3, pytest.param(6, marks=pytest.mark.slow), 7, pytest.param(8, marks=pytest.mark.slow)]
)
def test_one_rank_goes_on_bit_by_bit(step, accumulating, train_here, tmp_path):
    """Between log lines, on one, at an epoch's end, and in the second epoch."""
    whole, flags = accumulating
    run = take_up(whole, step, tmp_path / "run")
    code, error = train_here(*flags, "--output_dir", run, "--resume_from_checkpoint", "True")
    assert code == 0 and f"going on from {run}/checkpoint-{step}" in error
    assert_bit_identical(run, whole)


def test_a_run_that_has_done_its_steps_does_none_more(accumulating, train_here, tmp_path):
    """Its last step is in the middle of an epoch."""
    whole, flags = accumulating
    run = take_up(whole, STEPS, tmp_path / "run")
    code, _ = train_here(*flags, "--output_dir", run, "--resume_from_checkpoint", "True")
    assert code == 0 and handmade.read_state(run)["global_step"] == STEPS
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert_same_weights(run, whole, tolerance=0)


def test_what_was_trained_before_is_not_read_again(dataset, dropout, accumulating, train_here, tmp_path, monkeypatch):
    """transformers#40691: hours of reading what is thrown away."""
    from dft_train.data.dataset import PackedSplit

    read: list[tuple[int, ...]] = []
    real = PackedSplit.__getitem__

    def counted(self, micro):
        if self.name == "train":
            read.append(micro.packs)
        return real(self, micro)

    monkeypatch.setattr(PackedSplit, "__getitem__", counted)
    whole, flags = accumulating
    run = take_up(whole, 5, tmp_path / "run")
    no_workers = ("--dataloader_num_workers", 0, "--eval_strategy", "no", "--save_strategy", "no", "--max_steps", 7)
    code, _ = train_here(*flags, *no_workers, "--output_dir", run, "--resume_from_checkpoint", "True")
    assert code == 0
    # Steps 6 and 7 are the epoch's last: 4 packs and 1, in four micro-batches each.
    assert sum(len(packs) for packs in read) == 5 and len(read) == 8


def test_evaluation_workers_and_saving_do_not_move_the_data(dataset, qwen3, train_here, tmp_path):
    """transformers' test_resume_batch_order: the order is the uninterrupted run's, whatever happens in between."""
    common = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, *FLAGS, "--gradient_accumulation_steps", 4)
    plain, busy = tmp_path / "plain", tmp_path / "busy"
    quiet = ("--eval_strategy", "no", "--save_strategy", "no")
    assert train_here(*common, *quiet, "--output_dir", plain)[0] == 0
    assert train_here(*common, "--dataloader_num_workers", 2, "--eval_steps", 3, "--output_dir", busy)[0] == 0
    trained = [line for line in history(busy) if "eval_loss" not in line and "train_loss" not in line]
    assert trained == [line for line in history(plain) if "train_loss" not in line]
    assert_same_weights(busy, plain, tolerance=0)


def test_what_happens_at_an_epochs_end_happens_once(dataset, dropout, train_here, tmp_path):
    """A checkpoint of an epoch's last step is written behind what the epoch's end logs and evaluates."""
    common = (
        "--dataset_dir", dataset, "--model_name_or_path", dropout, *FLAGS, "--per_device_train_batch_size", 4,
        "--eval_strategy", "epoch", "--logging_strategy", "epoch", "--save_steps", 7,
    )  # fmt: skip
    whole = tmp_path / "whole"
    assert train_here(*common, "--output_dir", whole)[0] == 0
    run = take_up(whole, 7, tmp_path / "run")
    assert train_here(*common, "--output_dir", run, "--resume_from_checkpoint", "True")[0] == 0
    assert [line["step"] for line in history(run) if "eval_loss" in line] == [7, 9]
    assert_bit_identical(run, whole)


def test_intervals_are_those_of_the_command_line(accumulating, train_here, tmp_path):
    whole, flags = accumulating
    run = take_up(whole, 3, tmp_path / "run")
    resume = ("--resume_from_checkpoint", "True", "--logging_steps", 3, "--save_steps", 4)
    assert train_here(*flags, *resume, "--output_dir", run)[0] == 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (3, 4, 8, 9)]
    assert [line["step"] for line in history(run) if "loss" in line] == [2, 6, 9]


@pytest.mark.slow
def test_full_determinism_trains_the_same(dataset, dropout, train_here, tmp_path):
    """Asked for on GPUs; torch then refuses what has no deterministic form."""
    common = ("--dataset_dir", dataset, "--model_name_or_path", dropout, *FLAGS, "--per_device_train_batch_size", 4)
    for name, value in (("plain", "False"), ("full", "True")):
        assert train_here(*common, "--full_determinism", value, "--output_dir", tmp_path / name)[0] == 0
    assert_same_run(tmp_path / "full", tmp_path / "plain", rel=1e-6, weights=1e-6)


# Which checkpoint


def test_the_newest_whole_one_is_taken_and_the_others_named(accumulating, train_here, tmp_path):
    whole, flags = accumulating
    run = take_up(whole, 3, tmp_path / "run")
    for step in (4, 5, 6):
        shutil.copytree(whole / f"checkpoint-{step}", run / f"checkpoint-{step}")
    shutil.copytree(whole / "checkpoint-7", run / ".saving-checkpoint-7")
    (run / ".saving-checkpoint-7" / "contents.json").unlink()
    (run / "checkpoint-6" / "contents.json").unlink()
    with (run / "checkpoint-5" / "optimizer.pt").open("r+b") as file:
        file.truncate(5000)
    with (run / "checkpoint-4" / "model.safetensors").open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"\0\1\2")
    code, error = train_here(*flags, "--output_dir", run, "--resume_from_checkpoint", "True")
    assert code == 0
    assert "checkpoint-6: contents.json is missing or damaged" in error
    assert "checkpoint-5: optimizer.pt has 5,000 bytes, expected" in error
    assert "checkpoint-4: model.safetensors has changed since it was written" in error
    assert f"going on from {run}/checkpoint-3" in error
    assert not list(run.glob(".saving-*"))
    assert_bit_identical(run, whole)


def test_a_fresh_start_among_an_earlier_runs_checkpoints_is_refused(accumulating, train_here, tmp_path):
    """After a crash of the new run, the newest would be the old one's; and --save_total_limit would remove them."""
    whole, flags = accumulating
    run = take_up(whole, 3, tmp_path / "run")
    code, error = train_here(*flags, "--output_dir", run, "--save_total_limit", 1)
    assert code == 2 and "it holds checkpoints of an earlier run (checkpoint-3)" in error
    assert "`--resume_from_checkpoint True` goes on from it" in error and "loaded in" not in error
    assert [path.name for path in run.iterdir()] == ["checkpoint-3"]
    assert train_here(*flags, "--output_dir", run, "--dry_run", "True")[0] == 0


def test_where_none_is_whole_the_run_does_not_start_anew(accumulating, train_here, tmp_path):
    whole, flags = accumulating
    run = take_up(whole, 3, tmp_path / "run")
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    code, error = train_here(*flags, "--output_dir", run, "--resume_from_checkpoint", "True")
    assert code == 1 and "no checkpoint in" in error and "checkpoint-3: optimizer.pt is missing" in error
    code, error = train_here(*flags, "--output_dir", run, "--resume_from_checkpoint", run / "checkpoint-3")
    assert code == 1 and "optimizer.pt is missing" in error


def test_resume_refuses_what_are_other_steps(accumulating, train_here, tmp_path):
    whole, flags = accumulating
    run = take_up(whole, 3, tmp_path / "run")
    resume = ("--output_dir", run, "--resume_from_checkpoint", "True")
    code, error = train_here(*flags, *resume, "--data_seed", 1)
    assert code == 1 and "data_seed" in error
    code, error = train_here(*flags, *resume, "--per_device_train_batch_size", 3)
    assert code == 2 and "a step takes 4 packs" in error and "that divides 4: 1, 2, 4" in error
    code, error = train_here(*flags, "--output_dir", run, "--resume_from_checkpoint", whole / "checkpoint-3")
    assert code == 2 and "not in --output_dir" in error


def test_rates_and_decay_are_those_of_the_command_line(accumulating, train_here, tmp_path):
    """transformers takes up the checkpoint's, whatever the flags say."""
    whole, flags = accumulating
    run = take_up(whole, 3, tmp_path / "run")
    resume = ("--output_dir", run, "--resume_from_checkpoint", "True")
    code, error = train_here(*flags, *resume, "--learning_rate", 1e-3, "--weight_decay", 0.25)
    assert code == 0, error
    assert f"{run}/checkpoint-3: from here on with other settings: learning_rate 0.001 (was 0.003)" in error
    rates = [{line["step"]: line["learning_rate"] for line in history(path) if "loss" in line} for path in (run, whole)]
    assert [rates[0][step] / rates[1][step] for step in (2, 4, 6, 8)] == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    groups = torch.load(run / "checkpoint-9" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]


def test_another_number_of_steps_is_another_schedule_from_the_next_step_on(accumulating, train_here, tmp_path):
    whole, flags = accumulating
    run = take_up(whole, 3, tmp_path / "run")
    resume = ("--output_dir", run, "--resume_from_checkpoint", "True")
    assert train_here(*flags, *resume, "--max_steps", 7)[0] == 0
    rates = {line["step"]: line["learning_rate"] for line in history(run) if "loss" in line}
    # Two of seven steps warm up; the fourth has three behind it.
    assert rates[4] == pytest.approx(3e-3 * 0.5 * (1 + math.cos(math.pi * (3 - 2) / (7 - 2))))


def test_a_checkpoint_of_another_model_is_refused(accumulating, llama, train_here, tmp_path):
    whole, flags = accumulating
    run = take_up(whole, 3, tmp_path / "run")
    resume = ("--output_dir", run, "--resume_from_checkpoint", "True")
    wider = handmade.write_model(tmp_path / "wider", "qwen3", hidden_size=48)
    for more, expected in (
        (("--model_name_or_path", llama), "another model: it holds lm_head.weight, which this run's model does not"),
        (("--model_name_or_path", wider), "its lm_head.weight is [259, 32], this run's is [259, 48]"),
        (("--lora_r", 4), "it holds the whole model, and this run trains LoRA adapters"),
        (("--optim", "sgd"), "this run's is sgd: its states would not fit"),
        (("--lr_scheduler_type", "reduce_lr_on_plateau"), "its lr_scheduler_type is cosine"),
    ):
        code, error = train_here(*flags, *resume, *more)
        assert code == 1 and expected in error and "what to do: " in error, error
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_of_other_adapters_is_refused(dataset, qwen3, train_here, tmp_path):
    common = (
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path, "--max_steps", 1,
        "--save_steps", 1, "--logging_steps", 1,
    )  # fmt: skip
    assert train_here(*common, "--lora_r", 4)[0] == 0
    resume = (*common, "--resume_from_checkpoint", "True")
    for more, expected in (
        ((), "it holds LoRA adapters, and this run trains the whole model"),
        (("--lora_r", 8), "this run's is [8, "),
        (("--lora_r", 4, "--lora_target_modules", "q_proj"), "which this run's model does not have"),
        (("--lora_r", 4, "--lora_alpha", 64), "go on with --lora_alpha 8"),
        (("--lora_r", 4, "--use_rslora", "True"), "go on with --use_rslora False"),
    ):
        code, error = train_here(*resume, *more)
        assert code == 1 and expected in error, error
    assert train_here(*resume, "--lora_r", 4)[0] == 0


def test_a_checkpoint_of_weights_alone_is_not_resumed(dataset, qwen3, train_here, tmp_path):
    common = (
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path, "--max_steps", 2,
        "--save_steps", 1, "--save_only_model", "True",
    )  # fmt: skip
    assert train_here(*common)[0] == 0
    code, error = train_here(*common, "--resume_from_checkpoint", "True")
    assert code == 2 and "cannot be resumed" in error


def test_another_micro_batch_gets_the_accumulation_that_keeps_the_step(accumulating, train_here, tmp_path):
    whole, flags = accumulating
    run = take_up(whole, 8, tmp_path / "run")
    resume = ("--output_dir", run, "--resume_from_checkpoint", "True", "--per_device_train_batch_size", 2)
    code, error = train_here(*flags, *resume)
    assert code == 0 and "--gradient_accumulation_steps is 2 and not 4" in error


# Several ranks


def zero_file(directory: Path, stage: int, **more: object) -> Path:
    path = directory / f"zero{stage}{'-'.join(more)}.json"
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}), **more}
    path.write_text(json.dumps({**dict.fromkeys(auto, "auto"), "bf16": {"enabled": True}, "zero_optimization": zero}))
    return path


KINDS = ("ddp", "zero1", "zero2", "zero3", "offload2", "offload3")


@pytest.fixture(scope="module")
def layout(tmp_path_factory, dataset, qwen3):
    """The flags of a kind of run; `ranks` of them share a step of 12 packs."""
    directory = tmp_path_factory.mktemp("zero")

    def flags(kind: str, ranks: int) -> tuple:
        common = (
            "--dataset_dir", dataset, "--model_name_or_path", qwen3, *FLAGS, "--max_steps", 5, "--save_steps", 2,
            "--logging_steps", 1, "--eval_steps", 3, "--gradient_accumulation_steps", 12 // ranks,
        )  # fmt: skip
        if kind == "ddp":
            return common
        offload = {"offload_optimizer": {"device": "cpu"}} if kind.startswith("offload") else {}
        if kind == "offload3":
            offload["offload_param"] = {"device": "cpu"}
        # torch's Adam: DeepSpeed's own for the CPU is compiled at its first use.
        config = json.loads(zero_file(directory, int(kind[-1]), **offload).read_text())
        path = directory / f"{kind}.json"
        path.write_text(json.dumps({**config, "zero_force_ds_cpu_optimizer": False}))
        return (*common, "--deepspeed", path, "--torch_dtype", "float32")

    return flags


@pytest.fixture(scope="module")
def straight(tmp_path_factory, layout, ranks):
    """Runs that never stopped, by kind and number of ranks."""
    runs: dict[tuple[str, int], Path] = {}

    def run(kind: str, count: int) -> Path:
        if (kind, count) not in runs:
            path = tmp_path_factory.mktemp("straight") / f"{kind}-{count}"
            ranks(count, *layout(kind, count), "--output_dir", path)
            runs[kind, count] = path
        return runs[kind, count]

    return run


def slow_but(cases: tuple[tuple, ...], *fast: tuple) -> list:
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def kill_while_saving(ranks, started: list, temporary: Path) -> None:
    """`kill -9` the last rank while the first, which would finish the checkpoint, is held still."""
    deadline = time.monotonic() + 80
    while not temporary.is_dir():
        assert time.monotonic() < deadline, "it never saved\n" + "\n".join(rank.stderr for rank in started)
        time.sleep(0.0005)
    started[0].send(signal.SIGSTOP)
    try:
        assert temporary.is_dir()
        started[-1].send(signal.SIGKILL)
    finally:
        started[0].send(signal.SIGCONT)
    ranks.wait(started)
    assert all(rank.returncode for rank in started)


@pytest.mark.parametrize(("kind",), slow_but(tuple((kind,) for kind in KINDS), ("ddp",)))
def test_a_rank_killed_while_saving_costs_the_steps_since_the_last_checkpoint(kind, straight, layout, ranks, tmp_path):
    whole = straight(kind, 2)
    run = tmp_path / "run"
    flags = (*layout(kind, 2), "--output_dir", run)
    kill_while_saving(ranks, ranks.start(2, *flags), run / ".saving-checkpoint-4")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]
    done = ranks(2, *flags, "--resume_from_checkpoint", "True")
    assert f"going on from {run}/checkpoint-2" in done[0].stderr
    assert not list(run.glob(".saving-*"))
    assert_bit_identical(run, whole, 5)


OTHER_RANKS = tuple(
    (kind, before, after) for kind in KINDS for before, after in ((2, 1), (1, 2), (2, 3), (3, 2), (2, 4))
)


@pytest.mark.parametrize(("kind", "before", "after"), slow_but(OTHER_RANKS, ("ddp", 2, 1)))
def test_another_number_of_ranks_trains_the_same(kind, before, after, straight, layout, ranks, tmp_path):
    """The same packs in the same steps: tokens_seen of every step, and the weights, are the uninterrupted run's."""
    whole = straight(kind, before)
    run = take_up(whole, 2, tmp_path / "run")
    done = ranks(after, *layout(kind, before), "--output_dir", run, "--resume_from_checkpoint", "True")
    assert f"--gradient_accumulation_steps is {12 // after} and not {12 // before}" in done[0].stderr
    assert_same_logs(run, whole, rel=2e-4, resumed=True)
    assert_same_weights(run, whole, tolerance=2e-4)
    seen = [line["tokens_seen"] for line in history(run) if "tokens_seen" in line]
    assert seen == [line["tokens_seen"] for line in history(whole) if "tokens_seen" in line] and len(seen) == 5


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("zero2", "zero3"), ("zero3", "zero1")])
def test_another_stage_on_another_number_of_ranks(before, after, straight, layout, ranks, tmp_path):
    whole = straight(before, 2)
    run = take_up(whole, 2, tmp_path / "run")
    ranks(3, *layout(after, 3), "--output_dir", run, "--resume_from_checkpoint", "True")
    assert_same_weights(run, whole, tolerance=2e-4)


def test_ranks_that_cannot_share_a_step_are_told_which_can(straight, layout, ranks, tmp_path):
    run = take_up(straight("ddp", 2), 2, tmp_path / "run")
    done = ranks(5, *layout("ddp", 2), "--output_dir", run, "--resume_from_checkpoint", "True", check=2)
    assert "a step takes 12 packs" in done[0].stderr
    assert re.search(r"a number of ranks that divides 12: 1, 2, 3, 4, 6, 12", done[0].stderr)
