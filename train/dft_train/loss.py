"""The loss: hidden states, the head's weight and labels in; one number, its gradients and statistics out.

Dynamic Fine-Tuning ("On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
Rectification", arXiv 2508.05629) weighs each token's cross entropy by the probability that the model itself
gives to that token, held constant:

    weight = p_correct * dft_alpha + 1 - dft_alpha          (detached)
    loss   = sum(CE * weight * loss_weight) / num_valid_tokens

Every objective is such a row weight (`OBJECTIVES`). Because the weight of a row is known as soon as its
log-sum-exp is, both gradients are made in the forward pass, chunk by chunk: the logits of a few rows at a time
are all that ever exists. Called by `head`, inside the language model head's own forward, where ZeRO-3 has
gathered the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dft_common.schema import IGNORE_INDEX

CHUNK_ELEMENTS = 1 << 25
"""Logits of one chunk (128 MB of float32), whatever the vocabulary."""


def _dft_weight(p_correct: Tensor, dft_alpha: float) -> Tensor:
    return p_correct * dft_alpha + (1.0 - dft_alpha)


def _sft_weight(p_correct: Tensor, dft_alpha: float) -> Tensor:
    return torch.ones_like(p_correct)


OBJECTIVES: dict[str, Callable[[Tensor, float], Tensor]] = {"dft": _dft_weight, "sft": _sft_weight}
"""Name -> the weight of each row, from its p_correct ([rows] float32) and dft_alpha."""


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
    tokens: TokenStats | None = None


class _Options(NamedTuple):
    objective: str
    dft_alpha: float
    softcap: float | None
    logit_scale: float | None
    with_gradients: bool


class _Rows(NamedTuple):
    """What one chunk yields, [rows] float32, and the gradient of its loss by the head's output, [rows, vocab]."""

    loss: Tensor
    ce: Tensor
    p_correct: Tensor
    correct: Tensor
    gradient: Tensor | None


def _transformed(logits: Tensor, options: _Options) -> Tensor:
    """What the model makes of its head's output before the softmax."""
    if options.logit_scale is not None:
        logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits


def _chunk(logits: Tensor, labels: Tensor, loss_weights: Tensor | None, options: _Options) -> _Rows:
    """Loss, statistics and gradient of a few rows. `logits` [rows, vocab] float32, straight from the head."""
    logits = _transformed(logits, options)
    log_sum_exp = torch.logsumexp(logits, dim=-1)
    at_label = logits.gather(1, labels[:, None]).squeeze(1)
    ce = log_sum_exp - at_label
    p_correct = torch.exp(-ce)
    correct = (logits.argmax(dim=-1) == labels).float()
    weight = OBJECTIVES[options.objective](p_correct, options.dft_alpha)
    if loss_weights is not None:
        weight = weight * loss_weights
    if not options.with_gradients:
        return _Rows(ce * weight, ce, p_correct, correct, None)
    gradient = torch.exp(logits - log_sum_exp[:, None]) * weight[:, None]
    gradient.scatter_add_(1, labels[:, None], -weight[:, None])
    if options.softcap is not None:
        gradient *= 1.0 - (logits / options.softcap) ** 2
    if options.logit_scale is not None:
        gradient *= options.logit_scale
    return _Rows(ce * weight, ce, p_correct, correct, gradient)


class _LinearLoss(torch.autograd.Function):
    """Sum of the weighted losses of `rows` [live, hidden] against `weight` [vocab, hidden].

    Returns (sum of the loss, [4, live] statistics). The gradients are made in the forward, in float32, and only
    scaled in the backward: so the weight is read where ZeRO-3 holds all of it, and never again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            full = weight.float()
            stats = rows.new_zeros((4, len(rows)), dtype=torch.float32)
            needs = [options.with_gradients and needed for needed in ctx.needs_input_grad[:3]]
            d_rows = torch.zeros_like(rows, dtype=torch.float32) if needs[0] else None
            d_weight = torch.zeros_like(full) if needs[1] else None
            d_bias = full.new_zeros(len(full)) if needs[2] else None
            size = max(1, CHUNK_ELEMENTS // len(full))
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                x = rows[part].float()
                logits = torch.nn.functional.linear(x, full, None if bias is None else bias.float())
                row = _chunk(logits, labels[part], None if loss_weights is None else loss_weights[part], options)
                stats[:, part] = torch.stack((row.loss, row.ce, row.p_correct, row.correct))
                if d_rows is not None and row.gradient is not None:
                    d_rows[part] = row.gradient @ full
                if d_weight is not None and row.gradient is not None:
                    d_weight.addmm_(row.gradient.T, x)
                if d_bias is not None and row.gradient is not None:
                    d_bias += row.gradient.sum(0)
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        ctx.dtypes = (rows.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(stats)
        return stats[0].sum(), stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = (
            None if made is None else (made * gradients[0]).to(dtype)
            for made, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def _spread(values: Tensor, at: Tensor, tokens: int) -> Tensor:
    return values.new_zeros(tokens).index_copy_(0, at, values)


def linear_dft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    objective: str = "dft",
    dft_alpha: float = 0.7,
    loss_weights: Tensor | None = None,
    num_valid_tokens: Tensor | float | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    per_token: bool = False,
) -> tuple[Tensor, LossStats]:
    """The loss of a head `softcap(logit_scale * (hidden @ weight.T + bias))` and its statistics.

    hidden: [tokens, hidden_size], weight: [vocab, hidden_size], bias: [vocab], of any floating dtype; all
    arithmetic is in float32. labels: [tokens] int64, already shifted (`labels[i]` is what `hidden[i]` predicts),
    IGNORE_INDEX where dead. loss_weights: [tokens] float32, multiplied onto the row weight. num_valid_tokens: what
    the sum is divided by, over the whole optimizer step; default: the live labels given here.
    Returns the loss (0-dim float32; a connected zero where no label is live) and `LossStats`.
    """
    live = torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
    options = _Options(objective, dft_alpha, softcap, logit_scale, torch.is_grad_enabled())
    chosen_weights = None if loss_weights is None else loss_weights[live].float()
    total, rows = _LinearLoss.apply(hidden[live], weight, bias, labels[live], chosen_weights, options)  # pyright: ignore[reportGeneralTypeIssues]
    count = torch.tensor(float(len(live)), device=hidden.device)
    tokens = None
    if per_token:
        columns = (*rows, torch.ones_like(rows[0]))
        tokens = TokenStats(*(_spread(column, live, len(labels)) for column in columns))
    divisor = count.clamp(min=1) if num_valid_tokens is None else num_valid_tokens
    return total / divisor, LossStats(*rows.sum(dim=1), live=count, tokens=tokens)
