"""`--eval_only` against an eager loop over single conversations, with transformers alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from train import handmade, oracle


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
    expected = oracle.numbers(model_dir, rows[1], 0.7)
    assert set(expected) == {"", "sums", "more"}
    for source, numbers in expected.items():
        prefix = f"eval_{source}_" if source else "eval_"
        mine = [found[prefix + name] for name in ("loss", "ce_loss", "avg_p_correct")]
        assert mine == pytest.approx(numbers, rel=5e-6), source
    assert not list(run.glob("*.safetensors"))


def test_eval_split_chooses_the_split(dataset, rows, qwen3, train_here, tmp_path):
    arguments = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path, "--eval_only")
    assert train_here(*arguments, "--eval_split", "train")[0] == 0
    found = json.loads((tmp_path / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(oracle.numbers(qwen3, rows[0], 0.7)[""][0], rel=5e-6)
    code, error = train_here(*arguments, "--eval_split", "test")
    assert code == 1 and "no split 'test'" in error


def test_an_empty_validation_split(qwen3, rows, train_here, tmp_path):
    data = handmade.write_dataset(tmp_path / "data", rows[0][:6], [])
    arguments = ("--dataset_dir", data, "--model_name_or_path", qwen3, "--output_dir", tmp_path / "run")
    code, error = train_here(*arguments, "--eval_only")
    assert code == 1 and "the validation split is empty" in error
    code, error = train_here(*arguments, "--max_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1)
    assert code == 0 and error.count("nothing is evaluated") == 1


def weighted(conversations, weights=(0.0, 0.5, 1.0)):
    """Each assistant turn with the next of `weights`, those of context 0: as the build stores them."""
    made, turn = [], 0
    for row in conversations:
        own = [0.0] * len(row.ids)
        for at, live in enumerate(row.mask):
            turn += live and not row.mask[at - 1]
            own[at] = weights[turn % len(weights)] if live else 0.0
        made.append(dataclasses.replace(row, weights=own))
    return made


def test_weights_of_messages_count_in_evaluation_and_in_training(rows, qwen3, train_here, tmp_path):
    """A weight multiplies a token's loss; ce_loss and avg_p_correct take each token above 0 as one, 0 as context."""
    train, validation = weighted(rows[0][:9]), weighted(rows[1])
    for row in (*train, *validation):
        assert set(row.weights) <= {0.0, 0.5, 1.0}
    assert any(len({w for w, live in zip(row.weights, row.mask, strict=True) if live}) > 1 for row in validation)
    data = handmade.write_dataset(tmp_path / "data", train, validation)
    common = ("--dataset_dir", data, "--model_name_or_path", qwen3, "--output_dir", tmp_path / "run")
    assert train_here(*common, "--eval_only")[0] == 0
    found = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    names = ("loss", "ce_loss", "avg_p_correct")
    expected = oracle.numbers(qwen3, validation, 0.7)[""]
    assert [found[f"eval_{name}"] for name in names] == pytest.approx(expected, rel=5e-6)
    # One step of all packs: its numbers are those of the untrained model.
    code, _ = train_here(
        *common, "--max_steps", 1, "--per_device_train_batch_size", 5, "--gradient_accumulation_steps", 2,
        "--logging_steps", 1, "--save_strategy", "no",
    )  # fmt: skip
    assert code == 0
    line = next(line for line in handmade.read_state(tmp_path / "run")["log_history"] if "ce_loss" in line)
    assert line["epoch"] == 1.0
    assert [line[name] for name in names] == pytest.approx(oracle.numbers(qwen3, train, 0.7)[""], rel=5e-6)
