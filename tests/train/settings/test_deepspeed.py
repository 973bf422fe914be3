"""DeepSpeed: the user's flags under its launcher on two CPU ranks, with the user's own ZeRO-3 file; what is refused."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft_common.errors import SetupError
from dft_train.settings import deepspeed_checks
from dft_train.settings.deepspeed_config import Precision, choose_precision, read_deepspeed, working_copy
from train import handmade
from train.settings.test_arguments import users_flags

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def users_run(once, dataset, llama, launch):
    """(run directory, stderr, swanlab's directory): the flags of examples/train.sh with a built dataset, and a larger
    learning rate."""

    def train(directory: Path) -> tuple[str, str]:
        flags = users_flags()
        at = flags.index("--data_files")
        flags[at : at + 3] = ["--dataset_dir", str(dataset)]
        values = {
            "--model_name_or_path": llama, "--output_dir": directory / "run", "--logging_dir": directory / "logs",
            "--learning_rate": 2e-2, "--gradient_accumulation_steps": 2, "--eval_steps": 7, "--save_steps": 4,
            "--logging_steps": 2, "--deepspeed": REPO / "ds_config" / "zero3.json", "--num_train_epochs": 1,
            "--max_length": 64,
        }  # fmt: skip
        for name, value in values.items():
            flags[flags.index(name) + 1] = str(value)
        environment = {"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": str(directory / "swan")}
        return str(directory), launch("deepspeed", 2, *flags, env=environment).stderr

    directory, error = once("users-run", train)
    return Path(directory) / "run", error, Path(directory) / "swan"


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
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-7"]
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


def test_eval_only_under_zero3_is_the_same_on_two_ranks(users_run, dataset, ranks, train_here, tmp_path):
    run, _, _ = users_run
    common = ("--dataset_dir", dataset, "--model_name_or_path", run, "--eval_only", "--torch_dtype", "float32")
    zero3 = ("--deepspeed", REPO / "ds_config" / "zero3.json")
    ranks(2, *common, *zero3, "--per_device_eval_batch_size", 3, "--output_dir", tmp_path / "two")
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


def test_what_a_step_needs_is_filled_where_the_file_leaves_it_out():
    """Without `gradient_clipping` DeepSpeed would clip nothing, whatever --max_grad_norm is."""
    copy = working_copy({"zero_optimization": {"stage": 2}}, Precision(bf16=True, fp16=False))
    assert copy["gradient_clipping"] == copy["train_batch_size"] == copy["gradient_accumulation_steps"] == "auto"
    assert working_copy({"gradient_clipping": 0.5}, Precision(bf16=True, fp16=False))["gradient_clipping"] == 0.5


CONFIGURATIONS = ("zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_configurations_that_come_along(name):
    config = read_deepspeed(str(REPO / "ds_config" / f"{name}.json"))
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert config["train_batch_size"] == "auto"
    deepspeed_checks.refuse_sections(config)
    deepspeed_checks.refuse_unknown_keys(config)


def test_every_configuration_is_tried():
    assert sorted(path.stem for path in (REPO / "ds_config").glob("*.json")) == sorted(CONFIGURATIONS)


@pytest.mark.parametrize(
    "name",
    ["zero2", "zero2_offload", "zero3_offload"],
)
@pytest.mark.slow
def test_they_train_on_two_ranks(name, ranks, dataset, qwen3, tmp_path):
    """Offload compiles DeepSpeed's Adam where no run of this machine has done so yet: minutes."""
    run = tmp_path / "run"
    flags = (
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", run, "--max_steps", 6,
        "--logging_steps", 3, "--gradient_accumulation_steps", 2, "--learning_rate", 2e-2, "--save_strategy", "no",
        "--deepspeed", REPO / "ds_config" / f"{name}.json",
    )  # fmt: skip
    done = ranks.wait(ranks.start(2, *flags), timeout=400)
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    losses = [line["ce_loss"] for line in handmade.read_state(run)["log_history"] if "ce_loss" in line]
    assert losses[1] < losses[0]
    assert load_file(run / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def write(path: Path, config: dict) -> Path:
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage is 4, expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}}, "stage is 'auto', expected"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2: ranks are data-parallel only"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2: ranks are data-parallel only"),
        ({"pipeline": {"stages": 2}}, "pipeline.stages is 2: ranks are data-parallel only"),
        ({"elasticity": {"enabled": True}}, "elasticity.enabled is True: the pack index"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency.enabled is True: the pack index"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}}, "warmup_num_steps is a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "config",
)
def test_what_would_break_a_step_is_refused_before_the_model_is_loaded(config, text, train_here, tmp_path):
    path = write(tmp_path / "ds.json", config)
    code, error = train_here(
        "--dataset_dir", "none", "--model_name_or_path", "none", "--output_dir", tmp_path / "run", "--deepspeed", path
    )
    assert code == 2
    assert f"--deepspeed: {'scheduler.params.' if 'warmup' in text else ''}" in error and text in error


@pytest.mark.parametrize(
    "config",
    [{"sequence_parallel_size": 1}, {"tensor_parallel": {"autotp_size": 1}}, {"elasticity": {"enabled": False}}],
)
def test_what_is_off_is_not_refused(config):
    deepspeed_checks.refuse_sections(config)


def test_a_key_that_deepspeed_does_not_know():
    config = {"zero_optimization": {"stage": 3, "stage3_prefetch_buckets_size": 1, "reduce_bucket_size": "auto"}}
    with pytest.raises(SetupError, match=r"zero_optimization.stage3_prefetch_buckets_size: Extra inputs"):
        deepspeed_checks.refuse_unknown_keys(config)


@pytest.fixture
def settings(tmp_path):
    """Settings with --deepspeed and one flag that the file may give too."""
    from dft_train.settings.arguments import STATIC_FLAGS, make_settings

    def make(config: dict, **training):
        values = {flag.name: flag.default for flag in STATIC_FLAGS}
        given = {"dataset_dir": "d", "model_name_or_path": "m", "output_dir": "o"}
        made = make_settings({**values, **given}, given, frozenset())
        path = str(write(tmp_path / "ds.json", config))
        return dataclasses.replace(made, training={"deepspeed": path, **training})

    return make


def test_a_number_that_only_the_file_gives_is_taken(settings):
    config = {
        "gradient_clipping": 0.5, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": "auto"}},
    }  # fmt: skip
    found = deepspeed_checks.adopt(settings(config, gradient_accumulation_steps=2)).training
    assert {name: value for name, value in found.items() if name != "deepspeed"} == {
        "max_grad_norm": 0.5,
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
    }


def test_numbers_that_file_and_flags_give_differently(dataset, qwen3, train_here, tmp_path):
    """transformers would tell so too, but after the model is loaded."""
    path = write(tmp_path / "ds.json", {"gradient_clipping": 0.5, "zero_optimization": {"stage": 2}})
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path / "run", "--deepspeed", path,
        "--max_grad_norm", 1.0,
    )  # fmt: skip
    assert code == 2
    assert "the file and the flags differ: gradient_clipping=0.5 but max_grad_norm=1.0" in error
    assert 'write "auto" in the file' in error


@pytest.mark.parametrize("version", ["0.18.9", "0.9.0"])
def test_an_older_deepspeed_is_refused_with_the_reason(version, settings, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(SetupError, match=rf"{version}, expected 0.19 or later: .* CPU offload .*#7967") as caught:
        deepspeed_checks.adopt(settings({}))
    assert "pip install -U 'deepspeed>=0.19'" in caught.value.remedy


@pytest.mark.parametrize("version", ["0.19.0", "0.20.1+cu128", "1.0"])
def test_a_newer_one_is_not(version, settings, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    deepspeed_checks.adopt(settings({}))


def test_without_deepspeed(settings, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SetupError, match="DeepSpeed is not installed"):
        deepspeed_checks.adopt(settings({}))
