"""The auxiliary loss of mixture-of-experts models: transformers' own, and the same whatever the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from dft_common.errors import SetupError
from dft_common.manifest import read_manifest
from dft_train.data.collate import collate
from dft_train.data.dataset import PackedSplit, train_sampler
from dft_train.data.sampler import Layout
from dft_train.models.head import HeadTap, LossRequest
from dft_train.models.router import RouterLoss, balance_loss, router_loss
from train import handmade
from train.models.test_models import EXPERTS, assert_gradients
from train.same_run import assert_same_run, history

MOE = {**EXPERTS, "decoder_sparse_step": 1}
COEFFICIENT = 0.5
"""Large, so that the auxiliary loss matters."""


def logits_of(tokens: int, layers: int = 3, experts: int = 5) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    return tuple(torch.randn(tokens, experts, requires_grad=True) for _ in range(layers))


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return handmade.write_model(tmp_path_factory.mktemp("models") / "moe", "qwen3_moe", **MOE)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_formula_is_that_of_transformers(top_k):
    logits = logits_of(17)
    ours, theirs = balance_loss(logits, top_k), load_balancing_loss_func(logits, 5, top_k)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(*(torch.autograd.grad(loss, logits) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other)


def test_an_even_router_costs_top_k():
    torch.testing.assert_close(balance_loss([torch.eye(4)], 1), torch.tensor(1.0))


def test_each_pack_counts_by_its_part_of_the_steps_tokens_whoever_computes_it():
    """Packs of 4, 1 and 6 tokens, together and apart."""
    loss, logits = RouterLoss(coefficient=1.0, top_k=2), logits_of(11)
    packs = [[layer[start:end] for layer in logits] for start, end in ((0, 4), (4, 5), (5, 11))]
    apart = [loss(pack, [len(pack[0])], 11) for pack in packs]
    torch.testing.assert_close(loss(logits, [4, 1, 6], 11), torch.stack(apart).sum())
    by_hand = [load_balancing_loss_func(tuple(pack), 5, 2) * len(pack[0]) / 11 for pack in packs]
    torch.testing.assert_close(torch.stack(apart), torch.stack(by_hand))


def test_without_packs_it_is_a_connected_zero():
    logits = logits_of(2)
    loss = RouterLoss(coefficient=1.0, top_k=2)(logits, [], 11)
    assert loss == 0 and not torch.autograd.grad(loss, logits[0])[0].any()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_with_sft_it_is_the_whole_loss_of_transformers_in_value_and_gradient(architecture, checkpointing):
    torch.manual_seed(1)
    sizes = {**handmade.SMALL, **MOE, "num_local_experts": 4, "router_aux_loss_coef": COEFFICIENT}
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes), attn_implementation="sdpa")
    net.train()
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(handmade.random_rows([20], ids=(3, 64)), [0], 1, "sdpa")
    count = float((batch.labels[:, 1:] != -100).sum())
    theirs = net(**batch.inputs, labels=batch.labels, output_router_logits=True)
    theirs.loss.backward()
    expected = {name: weight.grad.clone() for name, weight in net.named_parameters()}
    net.zero_grad()
    router, tap = router_loss(net, None), HeadTap(net)
    assert router == RouterLoss(coefficient=COEFFICIENT, top_k=2)
    tap.wants_router = True
    main, _ = tap.loss(net, batch.inputs, LossRequest(batch.labels, None, count, "sft", 0.0))
    auxiliary = router(tap.router_logits, batch.pack_tokens, batch.step_tokens)
    loss = main + router.coefficient * auxiliary
    loss.backward()
    torch.testing.assert_close(auxiliary, theirs.aux_loss)
    torch.testing.assert_close(loss, theirs.loss)
    assert_gradients({name: weight.grad for name, weight in net.named_parameters()}, expected, 1e-5)


def test_what_the_model_is_not_asked_for_it_does_not_return(moe):
    net = AutoModelForCausalLM.from_pretrained(moe)
    tap, batch = HeadTap(net), collate(handmade.random_rows([9], ids=(3, 64)), [0], 1, "sdpa")
    tap.wants_router = True
    with torch.no_grad():
        tap.loss(net, batch.inputs, LossRequest(batch.labels, None, 1.0, "dft", 0.7))
    assert tap.router_logits is None


def test_it_counts_what_the_configuration_or_the_flag_says(moe, qwen3):
    net = AutoModelForCausalLM.from_pretrained(moe)
    assert net.config.output_router_logits is False
    assert router_loss(net, None) == RouterLoss(coefficient=0.001, top_k=2)
    assert router_loss(net, 0.0) is None
    assert router_loss(net, 0.02) == RouterLoss(coefficient=0.02, top_k=2)
    dense = AutoModelForCausalLM.from_pretrained(qwen3)
    assert router_loss(dense, None) is None and router_loss(dense, 0.0) is None
    with pytest.raises(SetupError, match="has no auxiliary loss"):
        router_loss(dense, 0.01)


FLAGS = (
    "--max_steps", 5, "--logging_steps", 1, "--learning_rate", 3e-3, "--adam_epsilon", 1e-4, "--torch_dtype", "float32",
    "--save_strategy", "no", "--router_aux_loss_coef", COEFFICIENT,
)  # fmt: skip


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory, dataset, moe) -> Path:
    from dft_train.cli import main

    run = tmp_path_factory.mktemp("accumulated") / "run"
    words = ("--dataset_dir", dataset, "--model_name_or_path", moe, "--output_dir", run, *FLAGS)
    assert main([str(word) for word in (*words, "--gradient_accumulation_steps", 4)]) == 0
    return run


def test_the_log_has_the_steps_auxiliary_loss(accumulated, dataset, moe):
    """Of the first step's four packs, by transformers."""
    split = PackedSplit(dataset, read_manifest(dataset), "train", 64, "sdpa")
    sampler = train_sampler(split, Layout(per_device=4, accumulation=1, world_size=1, rank=0), 42)
    packs = sampler.order(0)[:4]
    net = AutoModelForCausalLM.from_pretrained(moe, attn_implementation="sdpa").eval()
    expected = 0.0
    for pack in packs:
        (micro,) = [
            m
            for (m,) in train_sampler(split, Layout(per_device=1, accumulation=1, world_size=1, rank=0), 42)
            if m.packs == (pack,)
        ]
        with torch.no_grad():
            # With a cache, transformers does not look for packed sequences.
            found = net(**split[micro].inputs, output_router_logits=True, use_cache=False).aux_loss
        expected += float(found) * split.tokens[pack] / split.tokens[packs].sum()
    lines = [line for line in history(accumulated) if "aux_loss" in line]
    assert len(lines) == 5 and lines[0]["aux_loss"] == pytest.approx(expected, rel=1e-5)


def test_checkpointing_that_would_lose_its_gradient_is_refused(dataset, moe, train_here, tmp_path):
    common = ("--dataset_dir", dataset, "--model_name_or_path", moe, *FLAGS, "--output_dir", tmp_path)
    reentrant = ("--activation_checkpointing_kwargs", '{"use_reentrant": true}')
    code, error = train_here(*common, "--enable_gradient_checkpointing", *reentrant)
    assert code == 2 and "no gradient" in error and "--router_aux_loss_coef 0" in error
    assert not list(tmp_path.glob("*.safetensors"))
    flags = ("--enable_gradient_checkpointing", *reentrant, "--router_aux_loss_coef", 0, "--max_steps", 1)
    assert train_here(*common, *flags)[0] == 0


def test_it_changes_what_is_trained_and_micro_batches_do_not_multiply_it(
    accumulated, dataset, moe, train_here, tmp_path
):
    common = ("--dataset_dir", dataset, "--model_name_or_path", moe, *FLAGS)
    code, error = train_here(*common, "--output_dir", tmp_path / "four", "--per_device_train_batch_size", 4)
    assert code == 0 and "auxiliary loss counts 0.5" in error
    assert_same_run(tmp_path / "four", accumulated, rel=2e-5, weights=2e-5)
    code, error = train_here(
        *common, "--output_dir", tmp_path / "none", "--per_device_train_batch_size", 4, "--router_aux_loss_coef", 0
    )
    assert code == 0 and "auxiliary" not in error
    assert not any("aux_loss" in line for line in history(tmp_path / "none"))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "none", accumulated, rel=2e-5, weights=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, 2, 3], ids=["ddp", "zero2", "zero3"])
def test_two_ranks_train_the_same_mixture(zero, accumulated, dataset, moe, ranks, tmp_path):
    flags: list[object] = []
    if zero is not None:
        config = {"zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0}}
        (tmp_path / "deepspeed.json").write_text(json.dumps(config))
        flags = ["--deepspeed", tmp_path / "deepspeed.json"]
    common = ("--dataset_dir", dataset, "--model_name_or_path", moe, "--output_dir", tmp_path / "run", *FLAGS, *flags)
    ranks(2, *common, "--gradient_accumulation_steps", 2)
    assert_same_run(tmp_path / "run", accumulated, rel=2e-5, weights=2e-5)
