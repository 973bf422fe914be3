"""`--eval_only` against an eager loop over single conversations, with transformers alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from train import handmade


def eager_numbers(model_dir, conversations, alpha):
    """By source and overall: the DFT loss, CE and p_correct, one conversation at a time."""
    net = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    sums: dict[str, list[float]] = {}
    for row in conversations:
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([row.ids])).logits[0].double()
        for at in range(1, len(row.ids)):
            weight = 1.0 if row.weights is None else row.weights[at]
            if not row.mask[at] or weight == 0:
                continue
            ce = -torch.log_softmax(logits[at - 1], -1)[row.ids[at]].item()
            p = float(torch.exp(torch.tensor(-ce)))
            for name in (row.source, ""):
                one = sums.setdefault(name, [0.0] * 4)
                for k, value in enumerate((ce * (p * alpha + 1 - alpha) * weight, ce, p, 1.0)):
                    one[k] += value
    return {name: [total / one[3] for total in one[:3]] for name, one in sums.items()}


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_eval_only_is_the_eager_loop(architecture, request, dataset, rows, train_here, tmp_path):
    model_dir = request.getfixturevalue(architecture)
    run = tmp_path / "run"
    code, _ = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", model_dir, "--output_dir", run, "--eval_only", "True",
        "--dft_alpha", 0.7, "--per_device_eval_batch_size", 3,
    )  # fmt: skip
    assert code == 0
    found = json.loads((run / "eval_results.json").read_text())
    expected = eager_numbers(model_dir, rows[1], 0.7)
    assert set(expected) == {"", "sums", "more"}
    for source, numbers in expected.items():
        prefix = f"eval_{source}_" if source else "eval_"
        mine = [found[prefix + name] for name in ("loss", "ce_loss", "avg_p_correct")]
        assert mine == pytest.approx(numbers, rel=2e-5), source
    assert not list(run.glob("*.safetensors"))


def test_eval_split_chooses_the_split(dataset, rows, qwen3, train_here, tmp_path):
    arguments = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path, "--eval_only")
    assert train_here(*arguments, "--eval_split", "train")[0] == 0
    found = json.loads((tmp_path / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(eager_numbers(qwen3, rows[0], 0.7)[""][0], rel=2e-5)
    code, error = train_here(*arguments, "--eval_split", "test")
    assert code == 1 and "no split 'test'" in error


def test_an_empty_validation_split(qwen3, rows, train_here, tmp_path):
    data = handmade.write_dataset(tmp_path / "data", rows[0][:6], [])
    arguments = ("--dataset_dir", data, "--model_name_or_path", qwen3, "--output_dir", tmp_path / "run")
    code, error = train_here(*arguments, "--eval_only")
    assert code == 1 and "the validation split is empty" in error
    code, error = train_here(*arguments, "--max_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1)
    assert code == 0 and error.count("nothing is evaluated") == 1
