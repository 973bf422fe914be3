"""The loss: hidden states, the head's weight and labels in; one number, its gradients and statistics out.

Dynamic Fine-Tuning ("On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
Rectification", arXiv 2508.05629) weighs each token's cross entropy by the probability that the model itself
gives to that token, held constant:

    weight = p_correct * dft_alpha + 1 - dft_alpha          (detached)
    loss   = sum(CE * weight * loss_weight) / num_valid_tokens

Every objective is such a row weight (`objectives`). There are two ways to the same numbers: the fused one
(`three_products`), which never holds the logits, and the dense one below, all logits and autograd: the reference, and
what a head needs that is more than a weight and a bias. Called by `head`, inside the language model head's own
forward, where ZeRO-3 has gathered the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from dft_common.schema import IGNORE_INDEX
from dft_train.objectives import OBJECTIVES, Options, RowFacts, with_defaults
from dft_train.three_products import HeadOptions, LinearLoss

P_BINS = 10


class TokenStats(NamedTuple):
    """Per token, [tokens] float32, 0 where the label is dead."""

    loss: Tensor
    """CE times its weights, before the division by num_valid_tokens."""
    ce: Tensor
    p_correct: Tensor
    correct: Tensor
    """1 where the label is the most likely token."""
    live: Tensor


class LossStats(NamedTuple):
    """Sums over the live tokens, 0-dim float32 and detached; `tokens` only on request."""

    loss_sum: Tensor
    ce_sum: Tensor
    p_correct_sum: Tensor
    correct: Tensor
    live: Tensor
    weight_sum: Tensor
    """Of the objective's row weights, loss_weights not included."""
    entropy_sum: Tensor
    """In nats, of the model's distribution over the whole vocabulary."""
    p_histogram: Tensor
    """[P_BINS]: live tokens with p_correct in [0, .1), [.1, .2), ... [.9, 1]."""
    tokens: TokenStats | None = None


def _spread(values: Tensor, at: Tensor, tokens: int) -> Tensor:
    return values.new_zeros(tokens).index_copy_(0, at, values)


def _finish(
    total: Tensor, rows: Tensor, live: Tensor, tokens: int, num_valid_tokens: Tensor | float | None, per_token: bool
) -> tuple[Tensor, LossStats]:
    """The loss and its statistics, from the sum of the losses and the statistics of the live rows, [STATS, live]."""
    loss, ce, p_correct, correct, weight, entropy = rows.sum(dim=1)
    bins = (rows[2] * P_BINS).long().clamp(max=P_BINS - 1)
    histogram = (bins[:, None] == torch.arange(P_BINS, device=bins.device)).sum(dim=0, dtype=torch.float32)
    # Filled in, not copied from the host: that would wait for the device.
    count = rows.new_full((), float(len(live)))
    each = None
    if per_token:
        each = TokenStats(*(_spread(row, live, tokens) for row in (*rows[:4], torch.ones_like(rows[0]))))
    stats = LossStats(loss, ce, p_correct, correct, count, weight, entropy, histogram, each)
    return total / (count.clamp(min=1) if num_valid_tokens is None else num_valid_tokens), stats


def _find(labels: Tensor) -> Tensor:
    return torch.nonzero(labels != IGNORE_INDEX).squeeze(1)


def transformed(logits: Tensor, softcap: float | None, logit_scale: float | None) -> Tensor:
    """What the model makes of its head's output, with autograd: `softcap * tanh(logit_scale * x / softcap)`."""
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def logits_dft_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    objective: str = "dft",
    dft_alpha: float = 0.7,
    objective_options: Options | None = None,
    loss_weights: Tensor | None = None,
    num_valid_tokens: Tensor | float | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    per_token: bool = False,
    live: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """The dense way: `linear_dft_loss` of a head's output, [tokens, vocab] of any floating dtype, by autograd."""
    given = with_defaults(objective, {"dft_alpha": dft_alpha, **(objective_options or {})})
    live = _find(labels) if live is None else live
    chosen = None if loss_weights is None else loss_weights[live].float()
    with torch.autocast(logits.device.type, enabled=False):
        logits = transformed(logits.float(), softcap, logit_scale)
        ce = cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")[live]
        with torch.no_grad():
            rows = logits[live]
            entropy = torch.special.entr(rows.softmax(dim=-1)).sum(dim=-1)
            facts = RowFacts(torch.exp(-ce), ce.detach(), entropy, rows)
            weight = OBJECTIVES[objective].weight(facts, given)
            scaled = weight if chosen is None else weight * chosen
            correct = (rows.argmax(dim=-1) == labels[live]).float()
            stats = torch.stack((facts.ce * scaled, facts.ce, facts.p_correct, correct, weight, entropy))
        total = (ce * scaled).sum()
    return _finish(total, stats, live, len(labels), num_valid_tokens, per_token)


def linear_dft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    objective: str = "dft",
    dft_alpha: float = 0.7,
    objective_options: Options | None = None,
    loss_weights: Tensor | None = None,
    num_valid_tokens: Tensor | float | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    fused: str = "auto",
    per_token: bool = False,
    live: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """The loss of a head `softcap(logit_scale * (hidden @ weight.T + bias))` and its statistics.

    hidden: [tokens, hidden_size], weight: [vocab, hidden_size], bias: [vocab], of any floating dtype; all but the
    factors of the products is float32 (`three_products.product_dtype`). labels: [tokens] int64, already shifted
    (`labels[i]` is what `hidden[i]` predicts), IGNORE_INDEX where dead. objective: a name of
    `objectives.OBJECTIVES`, with dft_alpha and objective_options as its options. loss_weights: [tokens] float32,
    multiplied onto the row weight. num_valid_tokens: what the sum is divided by, over the whole optimizer step;
    default: the live labels given here. live: [live] int64, the places of the live labels in order, where they are
    known: to find them is to wait for the device. fused: "on" (and "auto") for `three_products`, "off" for
    `logits_dft_loss`.
    Returns the loss (0-dim float32; a connected zero where no label is live) and `LossStats`. A fused loss can be
    passed back once: its gradients are handed on, not copied.
    """
    if fused == "off":
        with torch.autocast(hidden.device.type, enabled=False):
            logits = linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        return logits_dft_loss(
            logits,
            labels,
            objective=objective,
            dft_alpha=dft_alpha,
            objective_options=objective_options,
            loss_weights=loss_weights,
            num_valid_tokens=num_valid_tokens,
            softcap=softcap,
            logit_scale=logit_scale,
            per_token=per_token,
            live=live,
        )
    given = with_defaults(objective, {"dft_alpha": dft_alpha, **(objective_options or {})})
    options = HeadOptions(objective, given, softcap, logit_scale)
    live = _find(labels) if live is None else live
    chosen = None if loss_weights is None else loss_weights[live].float()
    inputs = (hidden, weight, bias, live, labels[live], chosen, options, torch.is_grad_enabled())
    total, rows = LinearLoss.apply(*inputs)  # pyright: ignore[reportGeneralTypeIssues]
    return _finish(total, rows, live, len(labels), num_valid_tokens, per_token)
