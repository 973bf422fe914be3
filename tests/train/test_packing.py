"""Packed conversations are as if alone: loss and gradients; and the probe that asks a model about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dft_common.errors import SetupError
from dft_common.reader import Row
from dft_train.collate import collate, sequence_inputs
from dft_train.head import HeadTap, LossRequest
from dft_train.probe import LogitTransform, probe_logits, probe_packing
from train import handmade

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model(architecture: str, attention: str = "sdpa", **more):
    torch.manual_seed(1)
    config = AutoConfig.for_model(architecture, **{**SMALL, **more})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def inputs(sequences):
    return sequence_inputs([len(s) for s in sequences], np.concatenate([np.array(s) for s in sequences]), "sdpa")


def random_rows(lengths) -> list[Row]:
    random = np.random.default_rng(3)
    return [
        Row(
            input_ids=random.integers(0, 64, length).astype(np.int32),
            assistant_masks=random.random(length) < 0.6,
            source="s",
            id="0",
            loss_weights=None,
        )
        for length in lengths
    ]


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


ATTENTIONS = ["sdpa", "eager", pytest.param("flash_attention_2", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("qwen3", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
    ids=["qwen3", "llama", "qwen3-sliding"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_packed_equals_alone(architecture, more, attention, checkpointing):
    if attention == "flash_attention_2" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    net = model(architecture, attention, **more)
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    net.train()
    rows = random_rows([7, 12, 1, 9])
    alone = loss_and_gradients(net, [collate([row], [0], 10, attention) for row in rows])
    packed = loss_and_gradients(net, [collate(rows, [0] * 4, 10, attention)])
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert abs(packed[0]) > 1
    for name, gradient in alone[1].items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_positions_that_do_not_restart_would_leak():
    """What the test above guards against shows where positions run on."""
    net, rows = model("qwen3"), random_rows([7, 12])
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
        ("cohere", {"logit_scale": 0.0625}, LogitTransform(logit_scale=0.0625)),
    ],
)
def test_the_model_tells_what_it_does_to_its_logits(architecture, more, expected):
    net = model(architecture, "eager", **more).eval()
    tap = HeadTap(net)
    found = probe_logits(tap, net, net.config, inputs)
    assert found.softcap == expected.softcap
    assert found.logit_scale == pytest.approx(expected.logit_scale)
    probe_packing(tap, net, inputs, torch.float32)
    # With it, the loss is the one of the model's own logits.
    batch = collate(random_rows([15]), [0], 1, "eager")
    request = LossRequest(batch.labels, None, 1.0, "sft", 0.0, *found)
    ours, _ = tap.loss(net, batch.inputs, request)
    logits = net(**batch.inputs).logits[0, :-1].float()
    theirs = torch.nn.functional.cross_entropy(logits, batch.labels[0, 1:], ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


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


def test_a_model_that_carries_a_state_along_is_refused():
    net = model("lfm2", layer_types=["conv", "full_attention"]).eval()
    with pytest.raises(SetupError, match="sees the one before"):
        probe_packing(HeadTap(net), net, inputs, torch.float32)


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
        batch = collate(random_rows([20]), [0], 1, "sdpa")
        count = int((batch.labels[:, 1:] != -100).sum())
        ours, _ = HeadTap(net).loss(net, batch.inputs, LossRequest(batch.labels, None, count, "dft", 0.0))
        theirs = net(**batch.inputs, labels=batch.labels).loss
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_vocabulary_of_the_handmade_tokenizer(tokenizer):
    assert tokenizer.get_vocab_size() == handmade.VOCAB
