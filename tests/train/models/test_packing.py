"""Packed conversations are as if alone: loss and gradients; and the probe that asks a model about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dft_common.errors import SetupError
from dft_common.flags import run_command
from dft_prep.cli import cli as prep_commands
from dft_train.data.collate import collate, sequence_inputs
from dft_train.guards.probe import LogitTransform, probe_logits, probe_packing
from dft_train.models.head import HeadTap, LossRequest
from dft_train.models.recurrent import reset_states
from train import flash_on_a_cpu, handmade, oracle
from train.models.test_models import HYBRID
from train.same_run import assert_same_run


def model(architecture: str, attention: str = "sdpa", **more):
    torch.manual_seed(1)
    config = AutoConfig.for_model(architecture, **{**handmade.SMALL, **more})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def inputs(sequences):
    return sequence_inputs([len(s) for s in sequences], np.concatenate([np.array(s) for s in sequences]), "sdpa")


def loss_and_gradients(net, batches):
    """The sum of the batches' losses and what it leaves in the parameters."""
    net.zero_grad()
    tap, total = HeadTap(net), 0.0
    for batch in batches:
        request = LossRequest(batch.labels, batch.loss_weights, 10, "dft", 0.7)
        loss, _ = tap.loss(net, batch.inputs, request)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
    ids=["qwen3-sliding", "lfm2"],
)
def test_packed_equals_alone(architecture, more, attention, checkpointing, monkeypatch):
    """With each attention, and where activations are computed again; see `test_models` for the architectures, and
    `test_gpu` for flash-attn itself, whose place plain torch takes here."""
    varlen = flash_on_a_cpu.install(monkeypatch)
    net = model(architecture, attention, **more)
    reset_states(net)
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    net.train()
    rows = handmade.random_rows([7, 12, 1, 9])
    alone = loss_and_gradients(net, [collate([row], [0], 10, attention) for row in rows])
    packed = loss_and_gradients(net, [collate(rows, [0] * 4, 10, attention)])
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert abs(packed[0]) > 1
    for name, gradient in alone[1].items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert ((0, 7, 19, 20, 29) in varlen.borders) == (attention == "flash_attention_2")


def test_positions_that_do_not_restart_would_leak():
    """What the test above guards against shows where positions run on."""
    net, rows = model("qwen3"), handmade.random_rows([7, 12])
    packed = collate(rows, [0, 0], 10, "sdpa")
    right = loss_and_gradients(net, [packed])[0]
    packed.inputs["position_ids"] = torch.arange(19)[None]
    assert abs(loss_and_gradients(net, [packed])[0] - right) > 1e-3


@pytest.mark.parametrize(
    ("architecture", "more", "expected"),
    [
        ("qwen3", {}, LogitTransform()),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitTransform(softcap=30.0)),
        ("granite", {"logits_scaling": 4.0}, LogitTransform(logit_scale=0.25)),
    ],
)
def test_the_model_tells_what_it_does_to_its_logits(architecture, more, expected):
    net = model(architecture, "eager", **more).eval()
    found = probe_logits(HeadTap(net), net, net.config, inputs)
    assert found.softcap == expected.softcap
    assert found.logit_scale == pytest.approx(expected.logit_scale)


def test_an_unknown_change_of_the_logits_is_refused():
    net = model("qwen3").eval()
    plain = net.forward

    def squared(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        outputs.logits = outputs.logits**2
        return outputs

    net.forward = squared
    with pytest.raises(SetupError, match="changes its logits"):
        probe_logits(HeadTap(net), net, net.config, inputs)


def test_a_state_that_is_carried_along_is_refused_and_none_is_after_a_reset():
    net = model("lfm2", layer_types=["conv", "full_attention"]).eval()
    with pytest.raises(SetupError, match="sees the one before"):
        probe_packing(HeadTap(net), net, inputs, torch.float32)
    net = model("lfm2", layer_types=["conv", "full_attention"]).eval()
    reset_states(net)
    probe_packing(HeadTap(net), net, inputs, torch.float32)


def test_generation_carries_the_state_along_as_before():
    net = model("lfm2", layer_types=["conv", "full_attention"]).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    before = net.generate(ids, max_new_tokens=4, do_sample=False)
    reset_states(net)
    assert torch.equal(net.generate(ids, max_new_tokens=4, do_sample=False), before)


def test_a_model_that_cannot_be_packed_trains_on_one_conversation_at_a_time(rows, train_here, tmp_path):
    """gpt-oss: transformers makes its eager mask without the positions, so that every token sees those before it."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    sizes["layer_types"] = ["sliding_attention", "full_attention"]
    net = handmade.write_model(tmp_path / "model", "gpt_oss", **sizes)
    data = handmade.write_dataset(tmp_path / "data", *rows)
    common = ("--dataset_dir", data, "--model_name_or_path", net, "--output_dir", tmp_path / "run", "--max_steps", 2)
    code, error = train_here(*common)
    assert code == 2 and "sees the one before it" in error and "`--packing False`" in error
    assert "GptOssForCausalLM does not work with sdpa attention: eager is used" in error
    code, error = train_here(*common, "--packing", "False")
    assert code == 1 and f"run `dft-prep pack {data} --max_length 64 --packing False`" in error
    assert run_command(prep_commands, "dft-prep", ["pack", str(data), "--packing", "False"]) == 0
    code, error = train_here(*common, "--packing", "False", "--per_device_train_batch_size", 2)
    assert code == 2 and "sees the one before it" in error
    code, error = train_here(*common, "--packing", "False", "--gradient_accumulation_steps", 2)
    assert code == 0 and "40 rows in 40 packs" in error
    code, error = train_here(*common, "--packing", "False", "--eval_only")
    assert code == 0
    found = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(oracle.numbers(net, rows[1], 0.7)[""][0], rel=5e-6)


def test_the_patched_model_is_unchanged_without_a_question(tmp_path: Path):
    net = model("qwen3").eval()
    ids = torch.tensor([[3, 4, 5]])
    before = net(input_ids=ids).logits
    HeadTap(net)
    torch.testing.assert_close(net(input_ids=ids).logits, before)
    net.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, before)


def test_alpha_zero_is_the_models_own_loss():
    for architecture in ("qwen3", "llama"):
        net = model(architecture)
        batch = collate(handmade.random_rows([20]), [0], 1, "sdpa")
        count = int((batch.labels[:, 1:] != -100).sum())
        ours, _ = HeadTap(net).loss(net, batch.inputs, LossRequest(batch.labels, None, count, "dft", 0.0))
        theirs = net(**batch.inputs, labels=batch.labels).loss
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_vocabulary_of_the_handmade_tokenizer(tokenizer):
    assert tokenizer.get_vocab_size() == handmade.VOCAB


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3_next", "lfm2", "falcon_h1"])
def test_two_ranks_of_zero3_train_the_same_hybrid(architecture, dataset, ranks, tmp_path):
    """Ranks with more conversations in their packs than others run the recurrent layers more often."""
    case = next(case for case in HYBRID if case.model == architecture)
    net = handmade.write_model(tmp_path / "model", architecture, **case.sizes)
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    common = (
        "--dataset_dir", dataset, "--model_name_or_path", net, "--max_steps", 4, "--logging_steps", 1,
        "--learning_rate", 3e-3, "--adam_epsilon", 1e-4, "--torch_dtype", "float32", "--save_strategy", "no",
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    ranks(1, *common, "--output_dir", one, "--gradient_accumulation_steps", 4)
    zero3 = ("--deepspeed", tmp_path / "zero3.json")
    ranks(2, *common, "--output_dir", two, "--gradient_accumulation_steps", 2, *zero3)
    assert_same_run(two, one, rel=2e-5, weights=2e-5)
