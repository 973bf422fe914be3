"""The user's flags under the DeepSpeed launcher on two CPU ranks, with the user's own ZeRO-3 file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft_common.errors import SetupError
from dft_train.deepspeed_config import Precision, choose_precision, read_deepspeed, working_copy
from train import handmade
from train.test_arguments import users_flags

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def users_run(tmp_path_factory, dataset, llama, launch):
    """(run directory, stderr): the flags of examples/train.sh, with a dataset that is built, and a larger step size."""
    directory = tmp_path_factory.mktemp("users")
    run, swan = directory / "run", directory / "swan"
    flags = users_flags()
    at = flags.index("--data_files")
    flags[at : at + 3] = ["--dataset_dir", str(dataset)]
    values = {
        "--model_name_or_path": llama, "--output_dir": run, "--logging_dir": directory / "logs", "--max_length": 64,
        "--learning_rate": 2e-2, "--gradient_accumulation_steps": 2, "--eval_steps": 3, "--save_steps": 2,
        "--logging_steps": 2, "--deepspeed": REPO / "ds_config" / "zero3.json", "--num_train_epochs": 1,
    }  # fmt: skip
    for name, value in values.items():
        flags[flags.index(name) + 1] = str(value)
    done = launch("deepspeed", 2, *flags, env={"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": str(swan)})
    return run, done.stderr, swan


def test_the_loss_falls_and_every_metric_is_logged(users_run):
    run, error, _ = users_run
    lines = [line for line in handmade.read_state(run)["log_history"] if "loss" in line]
    assert lines[-1]["ce_loss"] < lines[0]["ce_loss"]
    names = {"loss", "ce_loss", "avg_p_correct", "token_accuracy", "dft_alpha", "grad_norm", "learning_rate"}
    assert names | {"tokens_seen", "tokens_per_second"} <= set(lines[0])
    assert error.count("sdpa is used in its place") == 1
    assert "[rank 1]" not in error


def test_the_checkpoint_is_a_model_with_its_tokenizer(users_run, llama):
    run, _, _ = users_run
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]
    for directory in (run, run / "checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert model.config.vocab_size == handmade.VOCAB
        assert handmade.VOCAB - 1 in model.generation_config.eos_token_id
        assert AutoTokenizer.from_pretrained(directory).chat_template == handmade.TEMPLATE
        assert not [path for path in directory.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    before, after = load_file(llama / "model.safetensors"), load_file(run / "model.safetensors")
    assert set(before) == set(after)
    moved = [
        name for name in before if not torch.equal(before[name].to(torch.bfloat16), after[name].to(torch.bfloat16))
    ]
    assert len(moved) >= 0.9 * len(before)
    assert after["model.norm.weight"].dtype == torch.bfloat16


def test_swanlab_got_the_run(users_run):
    _, _, swan = users_run
    assert b"train/ce_loss" in b"".join(path.read_bytes() for path in swan.rglob("*") if path.is_file())


def test_eval_only_under_zero3_is_the_same_on_two_ranks(users_run, dataset, launch, train_here, tmp_path):
    run, _, _ = users_run
    common = ("--dataset_dir", dataset, "--model_name_or_path", run, "--eval_only", "--torch_dtype", "float32")
    zero3 = ("--deepspeed", REPO / "ds_config" / "zero3.json")
    launch("torchrun", 2, *common, *zero3, "--per_device_eval_batch_size", 3, "--output_dir", tmp_path / "two")
    assert train_here(*common, "--output_dir", tmp_path / "one")[0] == 0
    one, two = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two"))
    for name, value in one.items():
        if "runtime" not in name and "per_second" not in name:
            assert two[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    ("training", "dtype", "expected"),
    [
        ({}, None, (True, False)),
        ({"bf16": True}, "float32", (True, False)),
        ({"bf16": False}, None, (False, False)),
        ({"fp16": True}, None, (False, True)),
        ({}, "float32", (False, False)),
        ({}, "bfloat16", (True, False)),
    ],
)
def test_explicit_precision_wins_over_the_file(training, dtype, expected):
    config = read_deepspeed(str(REPO / "ds_config" / "zero3.json"))
    before = json.dumps(config)
    precision = choose_precision(training, dtype, config)
    assert precision == Precision(*expected)
    copy = working_copy(config, precision)
    assert copy["bf16"]["enabled"] is expected[0]
    assert copy["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert json.dumps(config) == before


def test_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "ds.json"
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(SetupError, match="deepspeed"):
            read_deepspeed(str(path))


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_configurations_that_come_along(name):
    config = read_deepspeed(str(REPO / "ds_config" / f"{name}.json"))
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert config["train_batch_size"] == "auto"
