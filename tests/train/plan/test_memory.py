"""The predicted peak of memory against what torch's allocator hands out in real steps, and ZeRO's arithmetic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from dft_train.data.collate import sequence_inputs
from dft_train.models.head import HeadTap, LossRequest
from dft_train.plan.forecast import ways_to_save
from dft_train.plan.memory import PARTS, MemoryRequest, predict
from dft_train.plan.shape import ModelShape, count_parameters, few_layers, measure

TOKENS = 256
SIZES = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(architecture: str, **more):
    return AutoConfig.for_model(architecture, **{**SIZES, **more})


def allocated_peak(work) -> int:
    """Bytes, from the profiler's record of every allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sums = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(sums.max())


def two_steps(made, attention: str, checkpointing: bool, accumulation: int, dtype) -> None:
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tap, optimizer = HeadTap(model), torch.optim.AdamW(model.parameters(), fused=True)
    ids = np.arange(TOKENS) % 1000
    labels = torch.from_numpy(ids)[None].clone()
    labels[0, : TOKENS // 2 + 1] = -100
    inputs = sequence_inputs([TOKENS // 2, TOKENS // 2], ids, attention)
    for _ in range(2):
        for _ in range(accumulation):
            tap.loss(model, inputs, LossRequest(labels, None, 100.0, "dft", 0.7))[0].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("architecture", "attention", "checkpointing", "accumulation", "dtype"),
    [
        ("qwen3", "sdpa", False, 1, torch.float32),
        ("qwen3", "sdpa", True, 2, torch.float32),
        ("qwen3", "eager", True, 1, torch.bfloat16),
        ("gemma2", "eager", False, 2, torch.float32),
        ("gemma2", "eager", True, 1, torch.float32),
    ],
    ids=["qwen3", "qwen3-checkpointing", "qwen3-eager-bf16", "gemma2", "gemma2-checkpointing"],
)
def test_the_prediction_is_the_allocators_peak(architecture, attention, checkpointing, accumulation, dtype):
    made = config(architecture)
    request = MemoryRequest(
        shape=measure(made, attention=attention, dtype=dtype, tokens=TOKENS),
        live=TOKENS // 2 - 1,
        world_size=1,
        weight_bytes=dtype.itemsize,
        checkpointing=checkpointing,
        accumulates=accumulation > 1,
    )
    peak = allocated_peak(lambda: two_steps(made, attention, checkpointing, accumulation, dtype))
    assert predict(request).total == pytest.approx(peak, rel=0.15)


def test_a_deep_model_is_reckoned_from_its_first_layers():
    deep, all_run = (
        measure(config("gemma2", num_hidden_layers=n), attention="eager", dtype=torch.float32, tokens=64)
        for n in (24, 8)
    )
    assert deep.followed and deep.layers == 24
    assert deep.kept_by_layers == 3 * all_run.kept_by_layers
    assert deep.parameters - deep.embeddings - 128 == 3 * (all_run.parameters - all_run.embeddings - 128)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "phi3", "cohere", "llama", "mistral"])
def test_architectures_can_be_followed_without_weights(architecture):
    more = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if "moe" in architecture else {}
    shape = measure(config(architecture, **more), attention="sdpa", dtype=torch.float32, tokens=32)
    assert shape.followed and shape.kept_by_layers > 0
    assert shape.parameters == count_parameters(config(architecture, **more))


def test_sdpa_keeps_what_grows_with_the_square_and_flash_attention_does_not():
    def kept(attention, tokens):
        return measure(config("qwen3"), attention=attention, dtype=torch.bfloat16, tokens=tokens).kept_by_layers

    assert kept("flash_attention_2", 512) == 2 * kept("flash_attention_2", 256)
    assert kept("sdpa", 512) - 2 * kept("sdpa", 256) >= 5 * 2 * (512**2 - 2 * 256**2)


def test_few_layers_takes_the_first_of_every_list():
    small = few_layers(config("gemma2", num_hidden_layers=6), 3)
    assert small.num_hidden_layers == 3 and len(small.layer_types) == 3


N = 7_000_000_000
BIG = ModelShape(
    parameters=N, trainable=N, largest_layer=200_000_000, embeddings=500_000_000, head=500_000_000,
    head_trainable=True, vocabulary=125_000, hidden_size=4000, layers=32, tokens=8192, followed=True,
    kept_by_layers=60 << 30, kept_by_largest_layer=2 << 30, kept_elsewhere=0, largest_kept=1 << 28,
    layer_input=8192 * 4000 * 2,
)  # fmt: skip


def big(deepspeed=None, **more) -> MemoryRequest:
    standard = {"live": 4000, "world_size": 8, "weight_bytes": 2, "checkpointing": True, "accumulates": True}
    return MemoryRequest(shape=BIG, device="cuda", deepspeed=deepspeed, **{**standard, **more})


def zero(stage: int, **more):
    return {"zero_optimization": {"stage": stage, **more}}


def test_zero_parts_what_its_paper_says():
    """arXiv 1910.02054: 2 + 2 + 12 bytes a parameter; stage 1 parts the 12, 2 the gradients, 3 the weights too."""
    parts = {stage: predict(big(zero(stage))) for stage in (0, 1, 2, 3)}
    assert [plan.weights / N for plan in parts.values()] == [2, 2, 2, 0.25]
    assert [plan.optimizer / N for plan in parts.values()] == [12, 1.5, 1.5, 1.5]
    in_backward = [predict(big(zero(s), checkpointing=False)).gradients / N for s in (2, 3)]
    assert in_backward == [0.25, 0.25]


def test_what_is_offloaded_is_on_the_host():
    away = {"device": "cpu"}
    plan = predict(big(zero(3, offload_optimizer=away, offload_param=away)))
    assert plan.weights == plan.optimizer == plan.gradients == 0
    assert plan.host == pytest.approx(N / 8 * (12 + 2 + 2) + 4 * N / 8)
    assert predict(big(zero(3))).host == 0


def test_gathered_parameters_are_bounded_by_the_configuration():
    plans = [predict(big(zero(3, stage3_max_live_parameters=most))) for most in (1e9, 2e9, 1e8)]
    wide, wider, least = (plan.buffers for plan in plans)
    # stage3_max_reuse_distance (1e9) bounds it too; and a layer and what is fetched ahead must live.
    assert wide == wider == (5e8 + 1e9) * 2
    assert least == (5e8 + 500_000_000 + 5e7) * 2


def test_a_frozen_model_has_gradients_and_states_of_its_adapter_alone():
    request = big(zero(2))
    adapter = dataclasses.replace(request, shape=dataclasses.replace(BIG, trainable=N // 1000, head_trainable=False))
    assert predict(adapter).optimizer == predict(request).optimizer / 1000
    assert predict(request).total - predict(adapter).total > 2 * N


def test_ways_to_save_are_those_that_save_the_best_first():
    ways = ways_to_save(big(zero(1), checkpointing=False))
    totals = [way.total for way in ways]
    assert totals == sorted(totals) and totals[-1] < predict(big(zero(1), checkpointing=False)).total
    text = " ".join(way.flag for way in ways)
    assert "--enable_gradient_checkpointing True" in text and "zero3" in text
    assert not any("checkpointing" in way.flag for way in ways_to_save(big(zero(1))))


def test_the_parts_add_up():
    plan = predict(big(zero(3)))
    assert plan.total == sum(getattr(plan, name) for name in PARTS)
