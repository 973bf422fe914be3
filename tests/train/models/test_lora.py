"""LoRA: the gradients of the adapters, runs in every layout, what is saved of them, merging, refusals."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft_common.errors import SetupError
from dft_common.manifest import read_manifest
from dft_common.schema import IGNORE_INDEX
from dft_train.data.collate import sequence_inputs
from dft_train.models import lora
from dft_train.models.head import HeadTap, LossRequest
from dft_train.objectives import OBJECTIVES
from dft_train.settings.lora_flags import ALL_LINEAR, LoraSettings
from dft_train.weights.export import write_model
from train import handmade
from train.same_run import assert_same_logs

ADAPTER = "adapter_model.safetensors"
RANK, ALPHA = 3, 5.0


def wanted(**more: Any) -> LoraSettings:
    fields: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": (ALL_LINEAR,)}
    return LoraSettings(**{**fields, "modules_to_save": (), "rslora": False, **more})


def adapted(directory: Path, dataset: Path, **more: Any) -> Any:
    """A model with adapters that do something."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    made = lora.adapt(model, wanted(**more), read_manifest(dataset), 0)
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    return made.eval()


# The gradients, against the formula in float64 over the model's own logits


def row_weight(objective: str, logits: Tensor, p: Tensor, options: dict[str, float]) -> Tensor:
    if objective == "dft":
        return 0.6 * p + 0.4
    if objective == "power":
        return p ** options["power_k"]
    if objective == "threshold":
        return ((p >= options["threshold_low"]) & (p <= options["threshold_high"])).double()
    if objective == "eaft":
        top = logits.topk(int(options["eaft_top_k"])).values.softmax(-1)
        return -(top * top.log()).sum(-1) / math.log(options["eaft_top_k"])
    assert objective == "sft"
    return torch.ones_like(p)


def dense(
    directory: Path, made: Any, sequences: list[list[int]], objective: str, options: dict[str, float]
) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients of A and B by name), one sequence at a time, W + (alpha / r) B A in the place of W."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
    small = {
        name.removeprefix("base_model.model."): value.detach().double().requires_grad_()
        for name, value in made.named_parameters()
        if "lora_" in name
    }
    weights: dict[str, Tensor] = {}
    for name, value in model.named_parameters():
        stem = name.removesuffix(".weight")
        a, b = (small.get(f"{stem}.lora_{which}.default.weight") for which in "AB")
        weights[name] = value.detach() if a is None or b is None else value.detach() + b @ a * (ALPHA / RANK)
    total = torch.zeros((), dtype=torch.float64)
    for ids in sequences:
        logits = functional_call(model, weights, (torch.tensor([ids]),)).logits[0, :-1]
        log_p = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        total = total - (log_p * row_weight(objective, logits.detach(), log_p.detach().exp(), options)).sum()
    total.backward()
    return total.item(), {name: value.grad for name, value in small.items() if value.grad is not None}


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_value_and_gradients_are_those_of_the_formula(architecture, objective, request, dataset):
    directory = request.getfixturevalue(architecture)
    made = adapted(directory, dataset)
    sequences = [[7, 3, 90, 14, 200, 31], [65, 2, 77, 5]]
    flat = np.concatenate([np.asarray(ids) for ids in sequences])
    inputs = sequence_inputs([len(ids) for ids in sequences], flat, "sdpa")
    labels = torch.tensor([[IGNORE_INDEX, *ids[1:]] for ids in sequences[:1]]).reshape(-1)
    labels = torch.cat([labels, torch.tensor([IGNORE_INDEX, *sequences[1][1:]])])[None]
    options = dict(OBJECTIVES[objective].options)
    if objective == "threshold":
        options["threshold_low"] = 1e-3
    asked = LossRequest(
        labels=labels, loss_weights=None, num_valid_tokens=1.0, objective=objective, dft_alpha=0.6,
        objective_options={} if objective == "dft" else options,
    )  # fmt: skip
    tap = HeadTap(lora.plain_model(made))
    loss, _ = tap.loss(made, inputs, asked)
    loss.backward()
    expected, gradients = dense(directory, made, sequences, objective, options)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    found = {name.removeprefix("base_model.model."): value for name, value in made.named_parameters()}
    assert len(gradients) == 2 * 2 * 7
    for name, value in gradients.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[name].grad.double(), value, rtol=2e-3, atol=2e-4 * value.abs().max().item())
    assert [name for name, value in found.items() if value.grad is not None and "lora_" not in name] == []
    assert not tap.head.weight.requires_grad


# Saving and merging


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1, 40)[None]).logits


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        pytest.param("qwen3", {}, id="qwen3"),
        pytest.param("qwen3", {"rslora": True, "target_modules": ("q_proj", "down_proj")}, id="rslora"),
        pytest.param("qwen3", {"modules_to_save": ("embed_tokens", "lm_head")}, id="whole-layers"),
        pytest.param("llama", {"modules_to_save": ("embed_tokens",)}, id="tied"),
        pytest.param("gpt2", {}, id="transposed"),
        pytest.param("mixtral", {}, id="experts"),
    ],
)
def test_adapters_and_merged_models_load_to_what_was_trained(architecture, more, dataset, tmp_path, monkeypatch):
    sizes = {"llama": {"tie_word_embeddings": True}, "mixtral": {"num_local_experts": 4}}.get(architecture, {})
    base = handmade.write_model(tmp_path / "base", architecture, **sizes)
    made = adapted(base, dataset, **more)
    assert not torch.allclose(logits(made), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    expected = logits(made)

    lora.write_adapter(made, tmp_path / "adapter")
    made.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = (load_file(tmp_path / name / ADAPTER) for name in ("adapter", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)

    write_model(lora.plain_model(made), tmp_path / "merged", sources=lora.merged_sources(made))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(made), expected, rtol=0, atol=0)


def test_adapters_of_experts_made_elsewhere_are_merged(dataset, tmp_path):
    base = handmade.write_model(tmp_path / "base", "mixtral", num_local_experts=4)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=ALL_LINEAR))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    assert any("experts" in name and "lora_B" in name for name, _ in made.named_parameters())
    write_model(lora.plain_model(made), tmp_path / "merged", sources=lora.merged_sources(made))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(made), rtol=1e-4, atol=1e-4)


# Runs

STEPS = 6
FLAGS = (
    "--max_steps", STEPS, "--logging_steps", 1, "--learning_rate", 2e-2, "--adam_epsilon", 1e-4, "--lora_r", 4,
    "--save_steps", 3, "--eval_strategy", "steps", "--eval_steps", 6, "--torch_dtype", "float32",
)  # fmt: skip


class Run(NamedTuple):
    directory: Path
    flags: tuple[Any, ...]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, dataset, llama, ranks) -> Run:
    directory = tmp_path_factory.mktemp("lora") / "run"
    flags = ("--dataset_dir", dataset, "--model_name_or_path", llama, *FLAGS)
    ranks(1, *flags, "--output_dir", directory, "--per_device_train_batch_size", 4)
    return Run(directory, flags)


def assert_same_adapters(run: Path, other: Path, tolerance: float) -> None:
    found, expected = load_file(run / ADAPTER), load_file(other / ADAPTER)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def test_only_adapters_are_trained_and_saved(one_rank):
    for directory in (one_rank.directory, one_rank.directory / "checkpoint-3"):
        held = load_file(directory / ADAPTER)
        assert held and all("lora_" in name for name in held)
        assert all(value.abs().max() > 0 for value in held.values())
        assert not (directory / "model.safetensors").exists() and not (directory / "config.json").exists()
        assert AutoTokenizer.from_pretrained(directory).chat_template == handmade.TEMPLATE
        assert "AutoPeftModelForCausalLM" in (directory / "README.md").read_text()
    lines = [line["ce_loss"] for line in handmade.read_state(one_rank.directory)["log_history"] if "ce_loss" in line]
    assert lines[-1] < lines[0]


def test_a_resumed_run_is_the_uninterrupted_one(one_rank, train_here, tmp_path):
    import shutil

    shutil.copytree(one_rank.directory / "checkpoint-3", tmp_path / "checkpoint-3")
    code, error = train_here(
        *one_rank.flags,
        "--output_dir",
        tmp_path,
        "--per_device_train_batch_size",
        4,
        "--resume_from_checkpoint",
        "True",
    )
    assert code == 0 and "going on from" in error, error
    assert_same_logs(tmp_path, one_rank.directory, rel=0, resumed=True)
    assert_same_adapters(tmp_path, one_rank.directory, 0)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_train_the_same_and_merge(stage, one_rank, zero3_float32, ranks, tmp_path, dataset, train_here):
    config = json.loads(zero3_float32.read_text())
    config["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(config))
    run = tmp_path / "run"
    parts = ("--gradient_accumulation_steps", 2, "--deepspeed", tmp_path / "ds.json", "--enable_gradient_checkpointing")
    ranks(2, *one_rank.flags, *parts, "--output_dir", run, "--merge_lora")
    assert_same_logs(run, one_rank.directory, rel=1e-4)
    assert_same_adapters(run / "checkpoint-6", one_rank.directory, 2e-4)
    assert not (run / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(one_rank.flags[3], dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, run / "checkpoint-6")
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-4)
    numbers = {}
    for name, model in (("merged", run), ("adapter", run / "checkpoint-6")):
        out = tmp_path / name
        flags = ("--dataset_dir", dataset, "--model_name_or_path", model, "--eval_only", "--torch_dtype", "float32")
        assert train_here(*flags, "--output_dir", out)[0] == 0
        numbers[name] = json.loads((out / "eval_results.json").read_text())["eval_loss"]
    trained = [line["eval_loss"] for line in handmade.read_state(run)["log_history"] if "eval_loss" in line][-1]
    assert numbers == {"merged": pytest.approx(trained, rel=1e-4), "adapter": pytest.approx(trained, rel=1e-4)}


@pytest.mark.slow
def test_two_ranks_of_zero3_resume(one_rank, zero3_float32, ranks, tmp_path):
    import shutil

    parts = ("--gradient_accumulation_steps", 2, "--deepspeed", zero3_float32)
    whole, run = tmp_path / "whole", tmp_path / "run"
    ranks(2, *one_rank.flags, *parts, "--output_dir", whole)
    shutil.copytree(whole / "checkpoint-3", run / "checkpoint-3")
    ranks(2, *one_rank.flags, *parts, "--output_dir", run, "--resume_from_checkpoint", "True")
    assert_same_adapters(run, whole, 0)


@pytest.mark.slow
def test_an_adapter_is_trained_on(one_rank, train_here, dataset, tmp_path):
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", one_rank.directory, "--output_dir", tmp_path,
        "--max_steps", 2, "--save_strategy", "no", "--merge_lora",
    )  # fmt: skip
    assert code == 0, error
    assert (tmp_path / "model.safetensors").is_file()


# Added tokens

NEW_END, NEW_START = "<|new_end|>", "<|new_start|>"


@pytest.fixture(scope="module")
def added(tmp_path_factory, rows) -> Path:
    import dataclasses

    swap = {handmade.VOCAB - 1: handmade.VOCAB, handmade.VOCAB - 2: handmade.VOCAB + 1}
    swapped = [[dataclasses.replace(row, ids=[swap.get(i, i) for i in row.ids]) for row in part] for part in rows]
    directory = tmp_path_factory.mktemp("added") / "data"
    return handmade.write_dataset(directory, *swapped, added=(NEW_END, NEW_START), end_of_turn=NEW_END)


@pytest.mark.parametrize(("architecture", "layers"), [("qwen3", "embed_tokens lm_head"), ("llama", "embed_tokens")])
def test_added_tokens_without_their_rows_are_refused(architecture, layers, added, request, train_here, tmp_path):
    code, error = train_here(
        "--dataset_dir", added, "--model_name_or_path", request.getfixturevalue(architecture), "--output_dir", tmp_path,
        "--lora_r", 2, "--max_steps", 1,
    )  # fmt: skip
    assert code == 2 and f"`--lora_modules_to_save {layers}`" in error and NEW_END in error


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_added_tokens_are_learnt_on_one_rank_and_on_two(
    architecture, added, request, train_here, ranks, zero3_float32, tmp_path
):
    layers = ["embed_tokens"] if architecture == "llama" else ["embed_tokens", "lm_head"]
    flags = (
        "--dataset_dir", added, "--model_name_or_path", request.getfixturevalue(architecture), "--lora_r", 2,
        "--lora_modules_to_save", *layers, "--max_steps", 3, "--learning_rate", 1e-2, "--adam_epsilon", 1e-4,
        "--save_strategy", "no", "--torch_dtype", "float32",
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    code, error = train_here(*flags, "--output_dir", one, "--per_device_train_batch_size", 2)
    assert code == 0, error
    ranks(2, *flags, "--output_dir", two, "--deepspeed", zero3_float32)
    assert_same_adapters(two, one, 2e-4)
    held = load_file(one / ADAPTER)
    assert any("embed_tokens" in name and len(value) == handmade.VOCAB + 2 for name, value in held.items())
    # Without the end of the turn that is taught, a tokenizer's length would not fit the embedding.
    again = AutoPeftModelForCausalLM.from_pretrained(one, dtype=torch.float32)
    assert logits(again).shape[-1] == handmade.VOCAB + 2


def test_an_evaluation_computes_in_the_precision_of_the_training(ranks, dataset, qwen3, train_here, tmp_path):
    """--bf16 without DeepSpeed is autocast, which is around the adapted model and not around the one within. (Without
    it flash attention would get float32, which it cannot take.)"""
    common = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--bf16", "True", "--max_steps", 1)
    common += ("--lora_r", RANK, "--eval_on_start", "True", "--eval_strategy", "steps", "--save_strategy", "no")
    runs = {name: tmp_path / name for name in ("bare", "two")}
    assert train_here(*common, "--output_dir", runs["bare"])[0] == 0
    ranks(2, *common, "--output_dir", runs["two"])
    found = {name: handmade.read_state(run)["log_history"][0]["eval_loss"] for name, run in runs.items()}
    # Adapters begin as nothing, so this is the model itself: in float32, and under autocast.
    assert train_here(*common[:4], "--output_dir", tmp_path, "--eval_only")[0] == 0
    exact = json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"]
    assert found["two"] == pytest.approx(found["bare"], rel=1e-6)
    assert abs(found["two"] - exact) > 1e-5


# Refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(("--lora_alpha", 8), "--lora_alpha without --lora_r", id="no-rank"),
        pytest.param(("--merge_lora",), "--merge_lora without --lora_r", id="nothing-to-merge"),
        pytest.param(("--lora_r", 2, "--lora_target_modules", "nothing"), "linear layers: down_proj", id="no-layer"),
        pytest.param(("--lora_r", 2, "--lora_target_modules", "lm_head"), "this is the head", id="head"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags, message, dataset, qwen3, train_here, tmp_path):
    common = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path)
    code, error = train_here(*common, *flags)
    assert code == 2 and message in error, error


def test_an_adapter_on_an_adapter_is_refused(one_rank, dataset, train_here, tmp_path):
    common = ("--dataset_dir", dataset, "--model_name_or_path", one_rank.directory, "--output_dir", tmp_path)
    code, error = train_here(*common, "--lora_r", 2)
    assert code == 2 and "is an adapter already" in error


def test_without_peft_the_extra_is_named(qwen3, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = AutoModelForCausalLM.from_pretrained(qwen3)
    with pytest.raises(SetupError) as error:
        lora.adapt(model, wanted(), read_manifest(dataset), 0)
    assert error.value.remedy == "run `pip install 'dft-toolkit[lora]'`"
