"""`--dry_run`: what it prints for people and for programs."""

from __future__ import annotations

import json

import pytest
import torch

from dft_train.plan import forecast as plan
from dft_train.ranks import launch
from dft_train.verify.command import choose_layers


@pytest.fixture
def dry_run(dataset, qwen3, train_here, capfd, monkeypatch, tmp_path):
    """(exit code, stderr, the JSON on stdout)."""
    printed: list[str] = []
    monkeypatch.setattr(plan.click, "echo", printed.append)

    def run(*flags):
        code, error = train_here(
            "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path / "run", "--dry_run",
            *flags,
        )  # fmt: skip
        return code, error, json.loads(printed.pop()) if printed else None

    return run


def test_it_tells_the_memory_by_part_and_that_it_fits(dry_run):
    code, error, found = dry_run("--per_device_train_batch_size", 2)
    assert code == 0 and "it fits" in error and "2 packs a step" in error
    memory = found["memory"]
    assert memory["together"] == pytest.approx(sum(memory[name] for name in plan.PARTS), abs=6)
    assert memory["weights"] == 4 * found["parameters"] and found["trained_parameters"] == found["parameters"]
    assert 64 < found["tokens"] <= 128 and found["live"] > 0 and found["fits"]


def test_it_plans_for_the_ranks_that_it_would_start(dry_run, zero3_float32):
    one = dry_run("--deepspeed", zero3_float32)[2]
    code, error, eight = dry_run("--deepspeed", zero3_float32, "--num_gpus", 8)
    assert code == 0 and "8 packs a step" in error and "each of 8 devices" in error
    assert eight["world_size"] == 8
    assert eight["memory"]["optimizer"] == pytest.approx(one["memory"]["optimizer"] / 8, abs=2)


def test_lora_trains_little(dry_run):
    found = dry_run("--lora_r", 2)[2]
    assert found["trained_parameters"] < found["parameters"] / 5
    assert found["memory"]["optimizer"] == 8 * found["trained_parameters"]
    assert found["memory"]["activations"] > 0


def test_where_it_does_not_fit_it_says_what_would_help(dry_run, monkeypatch):
    monkeypatch.setattr(plan, "device_of_rank", lambda ranks: plan.Device("a small device", 100_000))
    code, error, found = dry_run("--per_device_train_batch_size", 2)
    assert code == 0 and not found["fits"]
    assert "IT DOES NOT FIT: a small device has 97.7 KiB" in error
    assert "--enable_gradient_checkpointing True" in error and "--per_device_train_batch_size 1" in error


def test_an_accelerator_that_is_not_cudas_has_this_machines_memory(monkeypatch):
    """As Apple's: it ended the dry run, as torch.cuda has no answer there."""
    monkeypatch.setattr(launch, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan.device_of_rank(1).name == "this machine's memory"
    assert choose_layers(None, 70_000_000_000, 2) == 2
