"""The objectives: what each trained token's cross entropy is weighed by. One table, one entry an objective.

Read by `arguments` (names, options and their defaults, so nothing here imports torch: the functions only call
methods of tensors) and by `loss` and `three_products`, which hold the weights constant: no gradient flows through
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Options = Mapping[str, float]
"""An objective's options by name, every one of them present."""


class RowFacts(NamedTuple):
    """What is known of the rows (tokens) to be weighed, all detached, float32."""

    p_correct: Tensor
    """[rows]: the probability that the model gives to the label."""
    ce: Tensor
    """[rows]: -log p_correct."""
    entropy: Tensor
    """[rows], in nats: of the model's whole distribution."""
    logits: Tensor
    """[rows, vocab], up to a constant a row. To be read, not changed."""


class Objective(NamedTuple):
    """One row of the table."""

    formula: str
    source: str
    options: Options
    """Its options with their defaults; each is a flag."""
    weight: Callable[[RowFacts, Options], Tensor]
    """[rows] float32: the weights."""


def _top_k_entropy(logits: Tensor, k: int) -> Tensor:
    """[rows]: entropy of the softmax over each row's k largest logits, divided by log k: 0 to 1."""
    k = min(k, logits.shape[-1])
    log_p = logits.topk(k, dim=-1).values.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1) / math.log(k)


def _dft(rows: RowFacts, given: Options) -> Tensor:
    return rows.p_correct * given["dft_alpha"] + (1.0 - given["dft_alpha"])


def _sft(rows: RowFacts, given: Options) -> Tensor:
    return rows.p_correct.new_ones(rows.p_correct.shape)


def _power(rows: RowFacts, given: Options) -> Tensor:
    return rows.p_correct ** given["power_k"]


def _threshold(rows: RowFacts, given: Options) -> Tensor:
    inside = (rows.p_correct >= given["threshold_low"]) & (rows.p_correct <= given["threshold_high"])
    return inside.to(rows.p_correct.dtype)


def _eaft(rows: RowFacts, given: Options) -> Tensor:
    return _top_k_entropy(rows.logits, int(given["eaft_top_k"])).clamp(min=0.0) ** given["eaft_alpha"]


_DFT = "arXiv 2508.05629 (dft_alpha 1; below, mixed with sft)"
_BEYOND = "arXiv 2510.00526"
_EAFT = "arXiv 2601.02151"

OBJECTIVES: dict[str, Objective] = {
    "dft": Objective("p_correct * dft_alpha + 1 - dft_alpha", _DFT, {"dft_alpha": 0.7}, _dft),
    "sft": Objective("1", "maximum likelihood", {}, _sft),
    "power": Objective("p_correct ** power_k", f"{_BEYOND}: -p^k / k", {"power_k": 0.5}, _power),
    "threshold": Objective(
        "1 if threshold_low <= p_correct <= threshold_high else 0",
        f"{_BEYOND}: thresholded",
        {"threshold_low": 0.1, "threshold_high": 1.0},
        _threshold,
    ),
    "eaft": Objective(
        "(entropy of the eaft_top_k most likely tokens / log eaft_top_k) ** eaft_alpha",
        _EAFT,
        {"eaft_top_k": 20, "eaft_alpha": 1.0},
        _eaft,
    ),
}

OPTIONS: dict[str, str] = {option: name for name, objective in OBJECTIVES.items() for option in objective.options}
"""Option -> the objective that takes it."""


def with_defaults(objective: str, given: Options) -> dict[str, float]:
    """Every option of `objective`: those `given`, the rest at their defaults."""
    return {
        **OBJECTIVES[objective].options,
        **{name: given[name] for name in OBJECTIVES[objective].options & given.keys()},
    }
