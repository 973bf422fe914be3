"""A step whose loss or gradient is not finite is never applied, in any layout, and its rows are named."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from dft_train.faults.nonfinite import DeepSpeedStep, PlainStep
from dft_train.faults.trace import StepTrace
from train import handmade

ODD = "Zwölf?"
"""No other row has a Z."""


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    """20 ordinary rows, and in the middle one whose prompt has a Z."""
    rows = handmade.conversations(tokenizer, 20)
    rows.insert(11, handmade.chat(tokenizer, [("user", ODD), ("assistant", "12")], "odd"))
    return handmade.write_dataset(tmp_path_factory.mktemp("data") / "data", rows, rows[:2])


def with_row(tmp_path_factory, tokenizer, value, **more):
    """A model whose embedding of Z is `value` all over."""
    model = handmade.write_model(tmp_path_factory.mktemp("model") / "m", "qwen3", **more)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][tokenizer.encode("Z").ids[0]] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def infinite(tmp_path_factory, tokenizer):
    """Its loss of the odd row is NaN."""
    return with_row(tmp_path_factory, tokenizer, torch.inf)


@pytest.fixture(scope="module")
def steep(tmp_path_factory, tokenizer):
    """Its loss of the odd row is finite, and the gradient of the first norm is not."""
    return with_row(tmp_path_factory, tokenizer, 1e-20, rms_norm_eps=0.0)


def config(path, stage, **more):
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({**dict.fromkeys(auto, "auto"), "zero_optimization": zero, **more}))
    return path


def flags(model, data, run, *more):
    common = ("--model_name_or_path", model, "--dataset_dir", data, "--output_dir", run, "--num_train_epochs", 1)
    return (*common, "--logging_steps", 1, "--save_steps", 1, *more)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_run_stops_with_the_row_and_the_weights_of_before(tmp_path, train_here, infinite, data, accumulation):
    run = tmp_path / "run"
    code, error = train_here(*flags(infinite, data, run, "--gradient_accumulation_steps", accumulation))
    assert code == 1
    assert "the loss is nan" in error
    assert "row 11 (source odd, id " in error and repr(ODD)[1:-1] in error
    rows = [line for line in error.splitlines() if ", row " in line]
    assert len(rows) < 5 and len({line.partition(", row ")[0] for line in rows}) == 1, "only rows of its pack"
    assert f"of {accumulation}, pack" in error
    step = int(error.partition("error: step ")[2].partition(":")[0])
    last = run / f"checkpoint-{step - 1}"
    assert f"the last whole checkpoint is {last}" in error or step == 1
    assert not (run / f"checkpoint-{step}").exists() and not (run / "model.safetensors").exists()
    if step > 1:
        head = load_file(last / "model.safetensors")["lm_head.weight"]
        assert torch.isfinite(head).all()


def test_a_finite_loss_with_an_infinite_gradient_is_told_apart(tmp_path, train_here, steep, data):
    code, error = train_here(*flags(steep, data, tmp_path / "run"))
    assert code == 1
    assert "the loss is finite, but its gradient is not" in error
    assert "row 11 (source odd" in error and error.count(", row ") == 1


def test_a_skipped_step_leaves_weights_moments_and_schedule_alone(tmp_path, train_here, infinite, data):
    run = tmp_path / "run"
    code, error = train_here(*flags(infinite, data, run, "--on_nan", "skip", "--save_total_limit", 1))
    assert code == 0
    assert error.count("left out by --on_nan skip (1 so far)") == 1
    history = [line for line in handmade.read_state(run)["log_history"] if "loss" in line]
    assert all(math.isfinite(line["loss"]) for line in history)
    assert history[-1]["skipped_steps"] == 1 and "skipped_steps" not in history[0]
    steps = len(history)
    (checkpoint,) = run.glob("checkpoint-*")
    optimizer = torch.load(checkpoint / "optimizer.pt")
    assert {int(state["step"]) for state in optimizer["state"].values()} == {steps - 1}
    assert torch.load(checkpoint / "scheduler.pt")["last_epoch"] == steps - 1
    weights = load_file(run / "model.safetensors")
    embedding = weights.pop("model.embed_tokens.weight")
    assert (~torch.isfinite(embedding)).any(dim=1).sum() == 1
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_steps_that_are_all_bad_end_a_run_that_skips(tmp_path, train_here, tmp_path_factory, tokenizer, data):
    model = handmade.write_model(tmp_path / "m", "qwen3")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, error = train_here(*flags(model, data, tmp_path / "run", "--on_nan", "skip"))
    assert code == 1
    assert "10 steps in a row were not finite" in error
    assert error.count("left out by --on_nan skip") == 9


LAYOUTS = [
    pytest.param(None, "stop", id="ddp-stop"),
    pytest.param(3, "skip", id="zero3-skip"),
    pytest.param(None, "skip", id="ddp-skip", marks=pytest.mark.slow),
    pytest.param(0, "skip", id="zero0-skip", marks=pytest.mark.slow),
    pytest.param(2, "skip", id="zero2-skip", marks=pytest.mark.slow),
    pytest.param(2, "stop", id="zero2-stop", marks=pytest.mark.slow),
    pytest.param(3, "stop", id="zero3-stop", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("stage", "on_nan"), LAYOUTS)
def test_two_ranks_decide_alike(tmp_path, ranks, infinite, data, stage, on_nan, precision):
    run = tmp_path / "run"
    more = ["--on_nan", on_nan, "--gradient_accumulation_steps", 2, "--save_total_limit", 1]
    if stage is not None:
        bf16 = {"bf16": {"enabled": True, "check_grad_overflow": False}} if precision == "bf16" else {}
        more += ["--deepspeed", config(tmp_path / "ds.json", stage, **bf16)]
    elif precision == "bf16":
        more += ["--bf16", "True"]
    done = ranks(2, *flags(infinite, data, run, *more), check=0 if on_nan == "skip" else 1)
    told = "".join(rank.stderr for rank in done)
    assert told.count("row 11 (source odd") == 1 and told.count("the loss is nan") == 1
    assert "Traceback" not in told
    if on_nan == "stop":
        assert not (run / "model.safetensors").exists()
        return
    weights = load_file(run / "model.safetensors")
    weights.pop("model.embed_tokens.weight")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert handmade.read_state(run)["log_history"][-2]["skipped_steps"] == 1


def scaled(scale):
    return PlainStep(SimpleNamespace(accelerator=SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale))))


def test_an_overflow_is_usual_while_the_scale_can_fall():
    assert scaled(65536.0).overflow_is_usual()
    assert not scaled(1.0).overflow_is_usual()

    def engine(fp16: bool, **scaler: Any) -> Any:
        optimizer = SimpleNamespace(overflow=True, loss_scaler=SimpleNamespace(**scaler))
        return SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: fp16)

    assert DeepSpeedStep(engine(True, dynamic=True, cur_scale=8.0, min_scale=1.0)).overflow_is_usual()
    assert not DeepSpeedStep(engine(True, dynamic=True, cur_scale=1.0, min_scale=1.0)).overflow_is_usual()
    assert not DeepSpeedStep(engine(True, dynamic=False, cur_scale=8.0)).overflow_is_usual()
    assert not DeepSpeedStep(engine(False, dynamic=False, cur_scale=1.0)).overflow_is_usual()
    at_minimum = engine(True, dynamic=True, cur_scale=1.0, min_scale=1.0, raise_error_at_min_scale=True)
    DeepSpeedStep(at_minimum)
    assert not at_minimum.optimizer.loss_scaler.raise_error_at_min_scale


def test_deepspeed_without_zero_gets_a_guard_of_its_own():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    how = DeepSpeedStep(cast(Any, SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: False)))
    for gradient, bad in ((1.0, False), (math.nan, True), (math.inf, True), (1.0, False)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), gradient)
        optimizer.step()
        assert how.was_left_out(None) is bad
        assert weight.equal(before) is bad
    assert int(optimizer.state[weight]["step"]) == 2


def test_an_infinite_loss_makes_its_gradient_not_finite():
    embeddings, head = torch.nn.Embedding(4, 2), torch.nn.Linear(2, 3)
    trace = StepTrace(embeddings, head)
    for loss in (1.0, math.inf):
        trace.clear()
        trace.begin([7])
        out = head(embeddings(torch.tensor([[0, 1]])))
        trace.set_loss(torch.tensor(loss), torch.tensor(6.0), torch.tensor(2.0))
        out.sum().backward()
        trace.end()
        assert embeddings.weight.grad is not None
        assert torch.isfinite(embeddings.weight.grad).all() == math.isfinite(loss)
        (micro,) = trace.micros
        assert micro.top is not None and not micro.top.any()
        assert [(cost.packs, cost.mean) for cost in trace.costs()] == [((7,), 3.0)]
