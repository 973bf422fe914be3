"""Out of memory is one message: where, how much, and what would help this run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dft_common.errors import SetupError
from dft_train import loss
from dft_train.faults import out_of_memory, trace
from dft_train.faults.out_of_memory import Memory, Situation, describe, hints, is_out_of_memory, known_ways, where_of
from dft_train.models import load as model

BIG = 1 << 50
GIB = 1 << 30
SITUATION = Situation(
    where="in the forward pass",
    on_gpu=True,
    train_batch=4,
    eval_batch=8,
    attention="sdpa",
    max_length=8192,
    checkpointing=False,
    fused_loss=False,
    zero_stage=2,
    offloads=False,
    world_size=8,
    lora=False,
    half=False,
)


def real_error():
    with pytest.raises(RuntimeError) as error:
        torch.empty(BIG)
    return error.value


def after(function):
    """`function`, which then asks for more memory than there is: what a CPU's allocator says is real."""

    def wrapped(*args, **kwargs):
        function(*args, **kwargs)
        torch.empty(BIG)

    return wrapped


@pytest.mark.parametrize(
    ("owner", "name", "where"),
    [
        (model, "add_rows", "while the model was loaded"),
        (loss, "_find", "in the loss"),
        (trace.StepTrace, "set_loss", "in the forward pass"),
        (trace, "_not_finite", "in the backward pass"),
        (torch.optim.AdamW, "_init_group", "in the optimizer's step"),
    ],
    ids=["loading", "loss", "forward", "backward", "optimizer"],
)
def test_the_message_says_where(tmp_path, train_here, qwen3, dataset, monkeypatch, owner, name, where):
    monkeypatch.setattr(owner, name, after(getattr(owner, name)))
    flags = ("--model_name_or_path", qwen3, "--dataset_dir", dataset, "--output_dir", tmp_path / "run")
    code, error = train_here(*flags, "--max_steps", 2, "--per_device_train_batch_size", 2)
    assert code == 2
    assert f"error: out of memory {where}: " in error
    assert "GiB of" in error and "what to do: what helps here" in error
    if where != "while the model was loaded":
        assert "--per_device_train_batch_size 1 and --gradient_accumulation_steps times 2" in error
        assert "--enable_gradient_checkpointing True" in error


def test_in_an_evaluation_its_batch_is_what_counts(tmp_path, train_here, qwen3, dataset, monkeypatch):
    from dft_train.metrics.sums import SourceSums

    monkeypatch.setattr(SourceSums, "add", after(SourceSums.add))
    flags = ("--model_name_or_path", qwen3, "--dataset_dir", dataset, "--output_dir", tmp_path / "run", "--eval_only")
    code, error = train_here(*flags, "--per_device_eval_batch_size", 4)
    assert code == 2
    assert "out of memory in an evaluation" in error
    assert "--per_device_eval_batch_size 1" in error and "--per_device_train_batch_size" not in error


def test_any_other_error_is_left_alone():
    with pytest.raises(RuntimeError, match="shape"), out_of_memory.explained(lambda where: SITUATION, list):
        raise RuntimeError("shape mismatch")
    assert is_out_of_memory(real_error()) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_prediction_that_fails_does_not_hide_the_message():
    def predict():
        raise ZeroDivisionError

    with pytest.raises(SetupError) as error, out_of_memory.explained(lambda where: SITUATION, predict):
        torch.empty(BIG)
    assert "--enable_gradient_checkpointing" in error.value.remedy


def test_only_what_would_change_something_is_named():
    everything = "\n".join([*hints(SITUATION), *known_ways(SITUATION)])
    for flag in (
        "batch_size 1",
        "flash_attention_2",
        "--bf16",
        "--lora_r",
        "checkpointing",
        "--fused_loss on",
        "zero3",
        "offload",
    ):
        assert flag in everything, flag
    best = dataclasses.replace(
        SITUATION,
        train_batch=1,
        attention="flash_attention_2",
        checkpointing=True,
        fused_loss=True,
        zero_stage=3,
        offloads=True,
        lora=True,
        half=True,
    )
    assert known_ways(best) == []
    assert [hint.split(" ")[0] for hint in hints(best)] == ["`dft-prep"]
    assert "batch_size" not in "\n".join(hints(dataclasses.replace(SITUATION, where="while the model was loaded")))


def test_the_sizes_of_a_gpu_are_told():
    memory = Memory(allocated=60 * GIB, held=75 * GIB, total=80 * GIB)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB. GPU 0 has ...\nmore")
    found = describe(error, SITUATION, memory, ["--x: saves about 1.00 GiB"])
    assert "Tried to allocate 6.00 GiB" in found.message and "more" not in found.message
    assert "60.00 GiB of 80.00 GiB of the GPU were in use, 15.00 GiB held free" in found.message
    assert "--x: saves about 1.00 GiB" in found.remedy and "expandable_segments" in found.remedy
    assert "mask of 32,768 x 32,768 tokens (2.00 GiB)" in found.remedy


def test_an_error_from_nowhere_is_before_the_first_step():
    assert where_of(real_error()) == "before the first step"
