"""Ranks, accumulation, micro-batches and ZeRO never change what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dft_common.manifest import read_manifest
from dft_train.data.dataset import PackedSplit, train_sampler
from dft_train.data.sampler import Layout as Deal
from train import handmade
from train.same_run import assert_same_run, assert_same_weights, history

# 25 packs, 4 a step: 7 steps an epoch, the last one short; so this goes over into a second epoch.
STEPS = 9
FLAGS = (
    "--max_steps", STEPS, "--logging_steps", 2, "--learning_rate", 3e-3, "--adam_epsilon", 1e-4,
    "--eval_strategy", "steps", "--eval_steps", 4, "--lr_scheduler_type", "cosine", "--warmup_ratio", 0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory, dataset, qwen3) -> Path:
    """One rank, a step's four packs in one micro-batch."""
    from dft_train.cli import main

    run = tmp_path_factory.mktemp("reference") / "run"
    common = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", run, *FLAGS)
    once = ("--save_strategy", "no", "--per_device_train_batch_size", 4)
    assert main([str(a) for a in (*common, *once)]) == 0
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
    code, _ = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path, "--save_strategy", "no",
        *FLAGS, "--logging_steps", 1, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
    )  # fmt: skip
    assert code == 0
    each = {line["step"]: line for line in history(tmp_path) if "loss" in line}
    pairs = {line["step"]: line for line in history(reference) if "loss" in line}
    split = PackedSplit(dataset, read_manifest(dataset), "train", 64, "sdpa")
    sampler = train_sampler(split, Deal(per_device=4, accumulation=1, world_size=1, rank=0), 42)
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


class Layout(NamedTuple):
    """How the four packs of a step are computed. `zero`: DeepSpeed's stage, None without it."""

    ranks: int
    per_device: int
    accumulation: int
    zero: int | None = None
    offload: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


OPTIMIZER, ALL = ("offload_optimizer",), ("offload_optimizer", "offload_param")
DENSE = ("--fused_loss", "off")
SLOW = pytest.mark.slow
LAYOUTS = [
    pytest.param(Layout(1, 2, 2), id="batch2-accumulate2"),
    pytest.param(Layout(1, 4, 1, flags=DENSE), id="batch4-dense"),
    pytest.param(Layout(2, 1, 2, zero=2), id="zero2"),
    pytest.param(Layout(2, 1, 2, zero=3), id="zero3"),
    pytest.param(Layout(2, 1, 2, zero=3, offload=ALL), id="zero3-offload"),
    pytest.param(Layout(2, 1, 2), id="ranks2-accumulate2", marks=SLOW),
    pytest.param(Layout(2, 2, 1), id="ranks2-batch2", marks=SLOW),
    pytest.param(Layout(1, 1, 4, zero=3), id="zero3-alone", marks=SLOW),
    pytest.param(Layout(2, 1, 2, zero=0), id="zero0", marks=SLOW),
    pytest.param(Layout(2, 1, 2, zero=1), id="zero1", marks=SLOW),
    pytest.param(Layout(1, 1, 4, zero=1, offload=OPTIMIZER), id="zero1-offload-alone", marks=SLOW),
    pytest.param(Layout(2, 1, 2, zero=2, offload=OPTIMIZER), id="zero2-offload", marks=SLOW),
    pytest.param(Layout(2, 1, 2, zero=3, offload=OPTIMIZER), id="zero3-offload-optimizer", marks=SLOW),
    pytest.param(Layout(2, 1, 2, zero=3, flags=DENSE), id="zero3-dense", marks=SLOW),
    pytest.param(Layout(4, 1, 1, zero=2), id="zero2-ranks4", marks=SLOW),
    pytest.param(
        Layout(2, 1, 2, zero=3, flags=("--enable_gradient_checkpointing", "True")), id="zero3-checkpointing", marks=SLOW
    ),
]


def deepspeed_config(layout: Layout) -> dict[str, Any]:
    """In float32, with nothing kept whole. torch's own optimizer on the CPU: DeepSpeed's would be compiled first."""
    zero: dict[str, Any] = {"stage": layout.zero, "stage3_param_persistence_threshold": 0}
    zero |= {part: {"device": "cpu"} for part in layout.offload}
    return {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, tokenizer) -> Path:
    """14 packs: of 4 steps the last is short, so that a rank has no pack; and some packs have no trained token."""
    rows = handmade.conversations(tokenizer, 17, weighted=True)
    silent = handmade.chat(tokenizer, [("user", "say nothing at all to this, please")], "more")
    rows[5:5] = [silent, silent]
    data = handmade.write_dataset(tmp_path_factory.mktemp("uneven") / "data", rows, rows[:2])
    split = PackedSplit(data, read_manifest(data), "train", 64, "sdpa")
    assert 12 < len(split) < 15 and 0 in split.lives.tolist() and len(set(split.tokens.tolist())) > 3
    return data


SIX_STEPS = (
    "--max_steps", 6, "--logging_steps", 1, "--learning_rate", 3e-3, "--adam_epsilon", 1e-4, "--weight_decay", 0.1,
    "--max_grad_norm", 0.5, "--lr_scheduler_type", "cosine", "--save_strategy", "no", "--torch_dtype", "float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory, uneven, qwen3) -> Path:
    """One rank, four micro-batches a step, without DeepSpeed."""
    from dft_train.cli import main

    run = tmp_path_factory.mktemp("accumulated") / "run"
    words = ("--dataset_dir", uneven, "--model_name_or_path", qwen3, "--output_dir", run, *SIX_STEPS)
    assert main([str(word) for word in (*words, "--gradient_accumulation_steps", 4)]) == 0
    norms = [line["grad_norm"] for line in history(run) if "grad_norm" in line]
    assert len(norms) == 6 and min(norms) > 0.5, "every gradient is to be clipped"
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_changes_what_is_trained(layout, accumulated, uneven, qwen3, ranks, tmp_path):
    """Six steps, over the end of an epoch: losses, gradient norms and weights; and so that no micro-batch's gradient
    is lost (DeepSpeed before 0.19 kept the first alone with CPU offload, #7967)."""
    flags = [*layout.flags]
    if layout.zero is not None:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(deepspeed_config(layout)))
        flags += ["--deepspeed", path]
    run = tmp_path / "run"
    ranks(
        layout.ranks, "--dataset_dir", uneven, "--model_name_or_path", qwen3, "--output_dir", run, *SIX_STEPS, *flags,
        "--per_device_train_batch_size", layout.per_device, "--gradient_accumulation_steps", layout.accumulation,
    )  # fmt: skip
    if layout.zero == 0:
        # In float32 DeepSpeed's plain way clips, and says no norm.
        losses = [[line["loss"] for line in history(one) if "loss" in line] for one in (run, accumulated)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-5)
        assert_same_weights(run, accumulated, tolerance=2e-5)
    else:
        assert_same_run(run, accumulated, rel=2e-5, weights=2e-5)
