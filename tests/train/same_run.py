"""Whether two runs trained the same: their logs line by line, and their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dft_train.metrics.sums import MEASURED
from train import handmade

_MEASURED = {*MEASURED, "eval_tokens_per_second", "eval_runtime", "train_runtime"}
_MEASURED |= {"train_samples_per_second", "train_steps_per_second", "total_flos"}


def history(run: Path, *, left_out: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """What was logged and not measured."""
    return [
        {name: value for name, value in line.items() if name not in _MEASURED | left_out}
        for line in handmade.read_state(run)["log_history"]
    ]


def assert_same_logs(run: Path, other: Path, *, rel: float, resumed: bool = False) -> None:
    """`resumed`: `train_loss` is of the steps that a process did, as it is in transformers."""
    import pytest

    left_out = frozenset({"train_loss"} if resumed else ())
    ours, theirs = history(run, left_out=left_out), history(other, left_out=left_out)
    assert len(ours) == len(theirs) > 4
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys(), line.keys() ^ expected.keys()
        for name, value in expected.items():
            same = line[name] == (pytest.approx(value, rel=rel, abs=1e-7) if rel else value)
            assert same, f"step {line['step']}, {name}: {line[name]} is not {value}"


def assert_same_weights(run: Path, other: Path, *, tolerance: float) -> None:
    mine, reference = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert set(mine) == set(reference)
    for name, tensor in reference.items():
        torch.testing.assert_close(
            mine[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_same_run(run: Path, other: Path, *, rel: float, weights: float) -> None:
    assert_same_logs(run, other, rel=rel)
    assert_same_weights(run, other, tolerance=weights)
