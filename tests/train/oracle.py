"""What the trainer must compute, by transformers alone: one conversation at a time, eager attention, float64.

Nothing here calls the trainer's code. The losses are those of the formula, over the model's own logits:
`sum(CE * (alpha * p + 1 - alpha) * weight) / count` with p detached.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from train.handmade import Conversation


class Tokens(NamedTuple):
    """The trained tokens of one conversation, [live] float64."""

    ce: Tensor
    p_correct: Tensor
    weight: Tensor

    def losses(self, alpha: float) -> Tensor:
        return self.ce * (alpha * self.p_correct + 1 - alpha) * self.weight


def double(net: Any) -> Any:
    """A copy of a model of transformers in float64, with eager attention and experts, without dropout."""
    net = copy.deepcopy(net).double().eval()
    net.set_attn_implementation("eager")
    net.set_experts_implementation("eager")
    return net


def load(directory: Path) -> Any:
    return double(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


def tokens(net: Any, row: Conversation) -> Tokens:
    """`net`: of `double`."""
    ids = torch.tensor(row.ids)
    weights = torch.tensor(row.weights or [1.0] * len(row.ids), dtype=torch.float64)
    live = torch.tensor(row.mask)[1:] & (weights[1:] > 0)
    logits = net(input_ids=ids[None]).logits[0, :-1].double()
    ce = torch.nn.functional.cross_entropy(logits[live], ids[1:][live], reduction="none")
    return Tokens(ce, torch.exp(-ce.detach()), weights[1:][live])


def loss_and_gradients(
    net: Any, rows: Iterable[Conversation], alpha: float, count: float
) -> tuple[float, dict[str, Tensor | None]]:
    """Over all `rows`, divided by `count`; by the name of the parameter. `net`: of `double`."""
    net.zero_grad()
    total = 0.0
    for row in rows:
        loss = tokens(net, row).losses(alpha).sum() / count
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad for name, weight in net.named_parameters()}


def numbers(directory: Path, rows: Iterable[Conversation], alpha: float) -> dict[str, list[float]]:
    """By source, and over all as "": the means of DFT loss, CE and p_correct over the trained tokens."""
    net = load(directory)
    sums: dict[str, Tensor] = {}
    for row in rows:
        with torch.no_grad():
            found = tokens(net, row)
        parts = [found.losses(alpha), found.ce, found.p_correct, torch.ones_like(found.ce)]
        new = torch.stack([part.sum() for part in parts])
        for name in (row.source, ""):
            sums[name] = sums.get(name, 0.0) + new
    return {name: (total[:3] / total[3]).tolist() for name, total in sums.items()}
