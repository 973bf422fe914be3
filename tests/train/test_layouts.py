"""Ranks, accumulation, micro-batches and ZeRO never change what is trained; resuming never does either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import handmade

# 25 packs, 4 a step: 7 steps an epoch, the last one short; so this goes over into a second epoch.
STEPS = 9
FLAGS = (
    "--max_steps", STEPS, "--logging_steps", 2, "--learning_rate", 3e-3, "--adam_epsilon", 1e-4,
    "--eval_strategy", "steps", "--eval_steps", 4, "--lr_scheduler_type", "cosine", "--warmup_ratio", 0.2,
)  # fmt: skip
TIMES = ("tokens_per_second", "eval_tokens_per_second", "eval_runtime", "train_runtime")
TIMES += ("train_samples_per_second", "train_steps_per_second", "total_flos")


def history(run: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in handmade.read_state(run)["log_history"]
    ]


def assert_same_run(run: Path, other: Path, *, rel: float, weights: float) -> None:
    ours, theirs = history(run), history(other)
    assert len(ours) == len(theirs) > STEPS // 2
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=rel, abs=1e-7)
    mine, reference = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert set(mine) == set(reference)
    for name, tensor in reference.items():
        torch.testing.assert_close(
            mine[name], tensor, rtol=weights, atol=weights, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture(scope="module")
def reference(tmp_path_factory, dataset, qwen3) -> Path:
    """One rank, a step's four packs in one micro-batch, checkpoints on the way."""
    from dft_train.cli import main

    run = tmp_path_factory.mktemp("reference") / "run"
    common = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", run, "--save_steps", 3, *FLAGS)
    assert main([str(a) for a in (*common, "--per_device_train_batch_size", 4)]) == 0
    return run


def test_the_logs_hold_every_metric_and_the_loss_falls(reference):
    lines = [line for line in handmade.read_state(reference)["log_history"] if "loss" in line]
    names = {"loss", "ce_loss", "avg_p_correct", "token_accuracy", "dft_alpha", "grad_norm", "learning_rate"}
    for line in lines:
        assert names | {"tokens_seen", "tokens_per_second"} <= set(line)
        assert all(isinstance(line[name], float | int) for name in names)
    assert lines[-1]["ce_loss"] < lines[0]["ce_loss"]
    evals = [line for line in handmade.read_state(reference)["log_history"] if "eval_loss" in line]
    assert [line["step"] for line in evals] == [4, 8, 9]
    assert {"eval_sums_loss", "eval_more_ce_loss", "eval_more_avg_p_correct"} <= set(evals[0])


def test_logged_numbers_are_sums_over_all_tokens_divided_once(reference, dataset, tmp_path, qwen3, train_here):
    """Logged every step and every two steps, the numbers fit only if no means of means are taken."""
    from dft_common.manifest import read_manifest
    from dft_train.dataset import PackedSplit, train_sampler
    from dft_train.sampler import Layout

    code, _ = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path, "--save_strategy", "no",
        *FLAGS, "--logging_steps", 1, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
    )  # fmt: skip
    assert code == 0
    each = {line["step"]: line for line in history(tmp_path) if "loss" in line}
    pairs = {line["step"]: line for line in history(reference) if "loss" in line}
    split = PackedSplit(dataset, read_manifest(dataset), "train", 64, "sdpa")
    sampler = train_sampler(split, Layout(per_device=4, accumulation=1, world_size=1, rank=0), 42)
    lives = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        lives += [micro.num_valid_tokens for (micro,) in sampler]
    assert len(set(lives)) > 2
    for step, line in pairs.items():
        a, b = lives[step - 2], lives[step - 1]
        for name in ("loss", "ce_loss", "avg_p_correct", "token_accuracy"):
            expected = (a * each[step - 1][name] + b * each[step][name]) / (a + b)
            assert line[name] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    final = next(line for line in history(tmp_path) if "train_loss" in line)
    assert final["train_loss"] == pytest.approx(sum(line["loss"] for line in each.values()) / STEPS, rel=1e-5)


@pytest.mark.parametrize(("per_device", "accumulation"), [(1, 4), (2, 2)])
def test_accumulation_changes_nothing(per_device, accumulation, reference, dataset, qwen3, train_here, tmp_path):
    code, _ = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path, "--save_strategy", "no",
        "--per_device_train_batch_size", per_device, "--gradient_accumulation_steps", accumulation, *FLAGS,
    )  # fmt: skip
    assert code == 0
    assert_same_run(tmp_path, reference, rel=2e-5, weights=2e-5)


@pytest.mark.parametrize(
    "zero", [pytest.param(False, id="ddp", marks=pytest.mark.slow), pytest.param(True, id="zero3")]
)
def test_two_ranks_change_nothing(zero, zero3_float32, reference, dataset, qwen3, ranks, tmp_path):
    more = ("--deepspeed", zero3_float32, "--torch_dtype", "float32") if zero else ()
    ranks(
        2, "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path,
        "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--save_steps", 5, *FLAGS, *more,
    )  # fmt: skip
    assert_same_run(tmp_path, reference, rel=1e-4, weights=1e-4)
    if zero:
        resumed = tmp_path / "resumed"
        resumed.mkdir()
        shutil.copytree(tmp_path / "checkpoint-5", resumed / "checkpoint-5")
        ranks(
            2, "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", resumed,
            "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--save_strategy", "no",
            *FLAGS, *more, "--resume_from_checkpoint", "True",
        )  # fmt: skip
        assert_same_resumed(resumed, tmp_path, rel=1e-6, weights=1e-6)


def assert_same_resumed(run: Path, other: Path, *, rel: float, weights: float) -> None:
    """`train_loss` is of the steps that this run did, as it is in transformers."""
    for directory in (run, other):
        path = directory / "trainer_state.json"
        state = json.loads(path.read_text())
        for line in state["log_history"]:
            line.pop("train_loss", None)
        path.write_text(json.dumps(state))
    assert_same_run(run, other, rel=rel, weights=weights)


@pytest.mark.parametrize("step", [3, 6], ids=["between-log-lines", "on-a-log-line"])
def test_a_resumed_run_is_the_uninterrupted_one(step, reference, dataset, qwen3, train_here, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(reference, whole)
    shutil.copytree(reference / f"checkpoint-{step}", run / f"checkpoint-{step}")
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", run, "--save_steps", 3, *FLAGS,
        "--per_device_train_batch_size", 4, "--resume_from_checkpoint", "True",
    )  # fmt: skip
    assert code == 0 and f"going on from {run}/checkpoint-{step}" in error
    assert_same_resumed(run, whole, rel=1e-9, weights=0)


def test_resume_refuses_other_steps(reference, dataset, qwen3, train_here, tmp_path):
    shutil.copytree(reference / "checkpoint-3", tmp_path / "checkpoint-3")
    common = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path, *FLAGS)
    resume = ("--resume_from_checkpoint", tmp_path / "checkpoint-3")
    code, error = train_here(*common, *resume, "--per_device_train_batch_size", 2)
    assert code == 1 and "its global_batch is 4, this run's is 2" in error
    code, error = train_here(*common, *resume, "--per_device_train_batch_size", 4, "--data_seed", 1)
    assert code == 1 and "data_seed" in error
    elsewhere = ("--resume_from_checkpoint", reference / "checkpoint-3")
    code, error = train_here(*common, *elsewhere, "--per_device_train_batch_size", 4)
    assert code == 2 and "not in --output_dir" in error
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    code, error = train_here(*common, *resume, "--per_device_train_batch_size", 4)
    assert code == 2 and "cannot be resumed" in error
