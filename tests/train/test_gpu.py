"""What only a CUDA device does: products of 16 bits with float32 sums, flash attention, NCCL, loss scaling.

Run `pytest -m gpu` where there is one. The runs are processes of their own, for all others hide the GPU.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dft_train import three_products
from dft_train.data.collate import Batch, collate
from dft_train.loss import linear_dft_loss
from dft_train.models.head import HeadTap, LossRequest
from train import handmade

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")
VISIBLE = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
needs_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("autocast", [False, True], ids=["halves", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_fused_loss_is_the_formula(dtype, autocast):
    """Against autograd in float64 over the same numbers; several chunks, the last one short."""
    if autocast and dtype is torch.float32:
        pytest.skip("autocast is to 16 bits")
    torch.manual_seed(0)
    three_products.TILE_ELEMENTS["cuda"], kept = 1 << 16, three_products.TILE_ELEMENTS["cuda"]
    try:
        hidden = torch.randn(300, 64, device=GPU).to(dtype)
        weight = (torch.randn(1001, 64, device=GPU) * 0.1).to(dtype)
        labels = torch.randint(1001, (300,), device=GPU).masked_fill(torch.rand(300, device=GPU) < 0.4, -100)
        exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
        logits = (exact[0] @ exact[1].T)[labels != -100]
        ce = torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="none")
        expected = (ce * (0.7 * torch.exp(-ce.detach()) + 0.3)).sum() / 100
        expected.backward()
        given = [tensor.float() if autocast else tensor.clone() for tensor in (hidden, weight)]
        given = [tensor.requires_grad_() for tensor in given]
        with torch.autocast("cuda", dtype, enabled=autocast):
            assert three_products.product_dtype(*given) == dtype
            loss, stats = linear_dft_loss(*given, labels, num_valid_tokens=100)
        # As loss scaling does.
        (loss * 1024).backward()
        assert float(loss) == pytest.approx(float(expected), rel=2e-5)
        assert float(stats.live) == int((labels != -100).sum())
        for ours, theirs in zip(given, exact, strict=True):
            assert distance(ours.grad.double() / 1024, theirs.grad) < (1e-5 if dtype is torch.float32 else 6e-3)
    finally:
        three_products.TILE_ELEMENTS["cuda"] = kept


def loss_and_gradient(net, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    net, total = copy.deepcopy(net), 0.0
    tap = HeadTap(net)
    for batch in batches:
        batch = batch.pin_memory().to(GPU)
        request = LossRequest(batch.labels, None, 10.0, "dft", 0.7, live=batch.live)
        loss, _ = tap.loss(net, batch.inputs, request)
        loss.backward()
        total += float(loss)
    return total, torch.cat([p.grad.flatten().double() for p in net.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flash_attention_2", marks=needs_flash)])
def test_packed_equals_alone(attention):
    torch.manual_seed(1)
    config = AutoConfig.for_model("qwen3", **handmade.SMALL)
    net = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16).to(GPU)
    made = handmade.random_rows([7, 12, 2, 9])
    alone = loss_and_gradient(net, [collate([row], [0], 10, attention) for row in made])
    packed = loss_and_gradient(net, [collate(made, [0] * 4, 10, attention)])
    assert packed[0] == pytest.approx(alone[0], rel=0.01) and alone[0] > 1
    assert distance(packed[1], alone[1]) < 0.05


ZERO3 = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


@pytest.mark.parametrize("deepspeed", [False, True], ids=["plain", "zero3"])
@pytest.mark.parametrize(
    "precision",
    [
        ("--bf16", "True"),
        ("--fp16", "True"),
        pytest.param(("--bf16", "True", "--attn_implementation", "flash_attention_2"), marks=needs_flash),
    ],
    ids=["bf16", "fp16", "flash"],
)
def test_a_run(precision, deepspeed, launch, dataset, qwen3, tmp_path):
    """Trains, evaluates, saves and goes on, with the guards at its first batch."""
    run = tmp_path / "run"
    flags = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", run, *precision)
    flags += ("--logging_steps", 1, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2)
    flags += ("--deepspeed", json.dumps(ZERO3)) if deepspeed else ()
    first = launch("python", 1, *flags, "--max_steps", 4, env=VISIBLE)
    assert "the loss agrees with the model's own logits" in first.stderr
    launch("python", 1, *flags, "--max_steps", 6, "--resume_from_checkpoint", "True", env=VISIBLE)
    history = handmade.read_state(run)["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert len(losses) == 6 and all(np.isfinite(losses))
    assert [line["step"] for line in history if "eval_loss" in line] == [2, 4, 6]
    assert all(0 < line["peak_memory_gib"] < 8 for line in history if "peak_memory_gib" in line)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_train_what_one_does(launch, dataset, qwen3, tmp_path):
    flags = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--max_steps", 3, "--logging_steps", 1)
    both = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}
    for name, ranks in (("one", 1), ("two", 2)):
        more = ("--output_dir", tmp_path / name, "--gradient_accumulation_steps", 2 // ranks, "--num_gpus", ranks)
        launch("python", 1, *flags, *more, env=both)
    one, two = (handmade.read_state(tmp_path / name)["log_history"] for name in ("one", "two"))
    assert [line["loss"] for line in two if "loss" in line] == pytest.approx(
        [line["loss"] for line in one if "loss" in line], rel=1e-4
    )
