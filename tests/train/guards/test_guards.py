"""The checks at the first batch: they find what they are for, and change nothing of the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dft_common.errors import SetupError
from dft_common.reader import Row
from dft_train import three_products
from dft_train.data.collate import collate
from dft_train.guards import first_batch as guards
from dft_train.guards.first_batch import Guard, ask_model
from dft_train.guards.probe import inputs_for, measure_leak, refuse_leak
from dft_train.models.head import HeadTap, LossRequest
from train import handmade

SMALL = {**handmade.SMALL, "initializer_range": 0.2}


def model(architecture: str = "qwen3", dtype=torch.float32, **more):
    torch.manual_seed(1)
    config = AutoConfig.for_model(architecture, **{**SMALL, **more})
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if architecture == "gemma2" else "sdpa", dtype=dtype
    )


def batch(lengths, live: float = 0.6, weighted: bool = False):
    random = np.random.default_rng(3)
    rows = [
        Row(
            input_ids=random.integers(0, 64, length).astype(np.int32),
            assistant_masks=random.random(length) < live,
            source="s",
            id="0",
            loss_weights=random.random(length).astype(np.float32) if weighted else None,
        )
        for length in lengths
    ]
    return collate(rows, [0] * len(rows), 10, "sdpa")


def guard_for(net, tmp_path: Path, **more) -> Guard:
    standard = {
        "tap": HeadTap(net), "config": net.config, "attention": "sdpa", "device": torch.device("cpu"),
        "dtype": net.dtype, "packs_share": True, "directory": tmp_path, "key": {"model": 1},
    }  # fmt: skip
    return Guard(**{**standard, **more})


def ask(net, tmp_path: Path, made, *, objective: str = "dft", **more):
    request = LossRequest(made.labels, made.loss_weights, 10.0, objective, 0.7)
    return ask_model(guard_for(net, tmp_path, **more), net, made, request, full=True)


def numbers(tmp_path: Path) -> dict[str, float]:
    return json.loads((tmp_path / guards.FILE_NAME).read_bytes())["numbers"]


@pytest.mark.parametrize(
    ("architecture", "more", "objective"),
    [
        ("qwen3", {}, "dft"),
        ("gemma2", {"final_logit_softcapping": 5.0}, "power"),
        ("cohere", {"logit_scale": 0.0625, "tie_word_embeddings": True}, "eaft"),
        ("granite", {"logits_scaling": 4.0}, "threshold"),
    ],
    ids=["qwen3", "gemma2", "cohere", "granite"],
)
def test_a_good_model_agrees_to_rounding(architecture, more, objective, tmp_path):
    net = model(architecture, **more).train()
    ask(net, tmp_path, batch([7, 30, 12, 9, 20], weighted=True), objective=objective)
    found = numbers(tmp_path)
    assert found["others"] == 0.0
    assert max(found.values()) < 2e-5
    assert all(parameter.grad is None for parameter in net.parameters())


def test_sixteen_bits_are_far_below_the_tolerance(tmp_path):
    ask(model(dtype=torch.bfloat16, num_hidden_layers=6), tmp_path, batch([70, 90, 120]))
    found = numbers(tmp_path)
    assert found["others"] == 0.0 and found["loss"] < 1e-5
    assert 0 < found["alone"] < 0.03 and found["logits"] < 0.006 and found["gradient"] < 0.006


def test_what_a_gpu_rounds_under_autocast_is_no_difference_of_the_loss(tmp_path, monkeypatch):
    """There float32 weights are multiplied in 16 bits. A CPU's products stand in for the two that only CUDA has."""

    def choose(rows, weight):
        return torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32

    for module in (guards, three_products):
        monkeypatch.setattr(module, "product_dtype", choose)
    monkeypatch.setattr(three_products, "_put_product", lambda a, b, out: out.copy_(a.float() @ b.float()))
    monkeypatch.setattr(three_products, "_add_product", lambda a, b, out: out.add_(a.float() @ b.float()))
    net = model()
    with torch.autocast("cpu", torch.bfloat16):
        ask(net, tmp_path, batch([30, 20]), dtype=torch.bfloat16)
    found = numbers(tmp_path)
    assert found["loss"] < 1e-5 and 0 < found["gradient"] < 0.006


def wrong_scale(loss):
    return lambda *args, **kwargs: (lambda out: (out[0] * 1.01, out[1]))(loss(*args, **kwargs))


def test_a_loss_that_is_one_percent_off_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "linear_dft_loss", wrong_scale(guards.linear_dft_loss))
    with pytest.raises(SetupError, match=r"loss differs .* by 0.01 .*0.0001 is allowed in float32"):
        ask(model(), tmp_path, batch([9, 20]))
    assert not (tmp_path / guards.FILE_NAME).exists()


def test_a_gradient_that_is_wrong_stops_the_run(tmp_path, monkeypatch):
    right = guards.linear_dft_loss

    def no_gradient_by_p(hidden, weight, labels, **options):
        # As if the weight were not held constant.
        loss, stats = right(hidden, weight, labels, **options)
        return loss + 0.05 * (loss - loss.detach()), stats

    monkeypatch.setattr(guards, "linear_dft_loss", no_gradient_by_p)
    with pytest.raises(SetupError, match="the gradients of the run's loss differ"):
        ask(model(), tmp_path, batch([9, 20]))


def test_logits_that_the_model_changes_by_their_place_stop_the_run(tmp_path):
    """The probe's few numbers pass; real logits do not."""
    net = model()
    plain = net.forward

    def biased(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        if outputs.logits.shape[-1] == 64:
            outputs.logits[..., :32] += 1.0
        return outputs

    net.forward = biased
    with pytest.raises(SetupError, match="own logits are not those"):
        ask(net, tmp_path, batch([9, 20]))


def test_positions_that_run_on_are_a_leak(tmp_path, monkeypatch):
    def running_on(attention, device):
        make = inputs_for(attention, device)

        def inputs(sequences):
            made = make(sequences)
            return {**made, "position_ids": torch.arange(made["position_ids"].shape[1])[None]}

        return inputs

    monkeypatch.setattr(guards, "inputs_for", running_on)
    for dtype in (torch.float32, torch.bfloat16):
        # Untrained weights, with which attention hardly matters.
        with pytest.raises(SetupError, match="sees the one before it"):
            ask(model(dtype=dtype, initializer_range=0.02), tmp_path, batch([9, 20, 14]))
    ask(model(), tmp_path, batch([9, 20, 14]), packs_share=False)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 0.02), (torch.bfloat16, 0.2)], ids=["float32-untrained", "bfloat16"]
)
def test_a_state_that_is_carried_along_is_a_leak(dtype, scale):
    net = model("lfm2", dtype, layer_types=["conv", "full_attention"], initializer_range=scale).eval()
    inputs = inputs_for("sdpa", torch.device("cpu"))
    leak = measure_leak(HeadTap(net), net, inputs, [[5, 3, 9, 4], [8, 6, 7, 1, 2]], 64)
    with pytest.raises(SetupError, match="sees the one before") as caught:
        refuse_leak(leak, dtype)
    assert "dft-prep pack OUT --packing False" in str(caught.value.remedy)


def test_numbers_that_are_none_are_left_to_others(tmp_path):
    net = model()
    with torch.no_grad():
        net.get_input_embeddings().weight.fill_(float("nan"))
    ask(net, tmp_path, batch([9, 20]))


@pytest.mark.parametrize("lengths", [[1], [2], [3], [600], [5, 1, 700, 2, 2, 30]], ids=str)
@pytest.mark.parametrize("live", [0.0, 1.0], ids=["dead", "live"])
def test_any_batch_makes_an_excerpt_of_four_short_sequences(lengths, live):
    excerpt = guards._excerpt(batch(lengths, live))
    assert len(excerpt.sequences) == 4
    assert all(1 <= len(ids) <= 512 for ids in excerpt.sequences)
    assert excerpt.labels.shape == (1, sum(map(len, excerpt.sequences)))
    assert int((excerpt.labels != -100).sum()) <= 256
    if live and max(lengths) > 3:
        assert bool((excerpt.labels != -100).any())


def test_each_module_keeps_its_mode(tmp_path):
    net = model().train()
    net.model.layers[0].eval()
    before = [module.training for module in net.modules()]
    ask(net, tmp_path, batch([9, 20]))
    assert [module.training for module in net.modules()] == before


def train(train_here, dataset, qwen3, run: Path, *more):
    return train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", run, "--max_steps", 3,
        "--logging_steps", 1, "--learning_rate", 1e-2, "--save_strategy", "no", *more,
    )  # fmt: skip


def test_a_run_is_bit_identical_with_and_without(dataset, tokenizer, tmp_path, train_here):
    dropping = handmade.write_model(tmp_path / "model", "qwen3", attention_dropout=0.3)
    code, error = train(train_here, dataset, dropping, tmp_path / "with")
    assert code == 0 and error.count("guards: ") == 1
    code, error = train(train_here, dataset, dropping, tmp_path / "without", "--guards", "False")
    assert code == 0 and "guards: " not in error
    ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    names = ("loss", "grad_norm")
    logs = [
        [
            {name: line[name] for name in names}
            for line in handmade.read_state(tmp_path / run)["log_history"]
            if "grad_norm" in line
        ]
        for run in ("with", "without")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_the_verdict_is_kept_until_something_changes(dataset, qwen3, tmp_path, train_here):
    assert "guards: " in train(train_here, dataset, qwen3, tmp_path)[1]
    assert "guards: " not in train(train_here, dataset, qwen3, tmp_path)[1]
    assert "guards: " in train(train_here, dataset, qwen3, tmp_path, "--objective", "sft")[1]
    (tmp_path / guards.FILE_NAME).write_text("{")
    assert "guards: " in train(train_here, dataset, qwen3, tmp_path, "--objective", "sft")[1]
