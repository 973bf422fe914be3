"""The fused way of the loss: three products, no logits in memory, in plain torch. Called by `loss`.

The weight of a row is known as soon as its log-sum-exp is. So both gradients are made in the forward pass, chunk by
chunk of the live rows: one product makes the logits of a few rows in a tile, `_rows` turns the tile into the gradient
by the logits, and two more products add that to dX and dW. The backward pass only scales what is there, once, in
float32. The tile is the only memory beyond the gradients themselves.

Products are in float32; where CUDA can multiply bfloat16 or float16 into float32, those stay what they are. All else
(log-sum-exp, p_correct, cross entropy, dX, dW) is float32 always.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dft_train.objectives import OBJECTIVES, Options, RowFacts

TILE_ELEMENTS = {"cpu": 3 << 23, "cuda": 1 << 27}
"""Float32 logits of a chunk by device: 96 and 512 MB. Each chunk reads and writes all of dW, so few rows are dear."""
GROUP_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Of the rows that `_rows` takes at once: on a CPU they and their exponentials stay in its cache."""
BLOCK_ELEMENTS = 1 << 23
"""Of the weight that are cast at once, where it is not of the products' dtype."""
STATS = 6
"""Rows of the statistics: loss, CE, p_correct, correct, objective weight, entropy."""

_FLOAT16_GAIN = 1024.0
"""Onto gradients that pass through float16, whose smallest numbers are too large for a softmax; taken off after."""
_TRIAL = 16
"""Rows and columns of the product that asks a device what it can."""


def _on(elements: Mapping[str, int], device: torch.device) -> int:
    return elements.get(device.type, elements["cuda"])


class HeadOptions(NamedTuple):
    """The objective, and what the model makes of its head's output before the softmax."""

    objective: str
    given: Options
    softcap: float | None = None
    logit_scale: float | None = None


@functools.cache
def sums_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can add products of 16 bits to a float32 matrix there: it is tried, once. Before 2.10 no build can
    (pytorch#167931), and not every one for ROCm."""
    ones = torch.ones((_TRIAL, _TRIAL), dtype=dtype, device=device)
    out = torch.ones((_TRIAL, _TRIAL), dtype=torch.float32, device=device)
    into = torch.empty_like(out)
    try:
        with torch.autocast(device.type, enabled=False):
            _add_product(ones, ones, out)
            _put_product(ones, ones, into)
    except (RuntimeError, TypeError):
        return False
    return bool((out == _TRIAL + 1).all() and (into == _TRIAL).all())


def product_dtype(rows: Tensor, weight: Tensor) -> torch.dtype:
    """What the products' factors are in; they are summed up in float32."""
    device = rows.device.type
    if device != "cuda":
        return torch.float32
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    same = dtype == rows.dtype or torch.is_autocast_enabled(device)
    halves = same and dtype in (torch.bfloat16, torch.float16) and sums_halves(rows.device, dtype)
    return dtype if halves else torch.float32


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b, `out` float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _put_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, `out` float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`weight` in `dtype`: as it is, or cast a few rows at a time, so that no second copy of it ever exists."""
    size = len(weight) if weight.dtype == dtype else max(1, BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        yield part, weight[part].to(dtype)


def _transform(logits: Tensor, options: HeadOptions) -> None:
    """What the model makes of its head's output, in place: `softcap * tanh(logit_scale * x / softcap)`."""
    if options.logit_scale is not None:
        logits *= options.logit_scale
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)


def _rows(
    logits: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    options: HeadOptions,
    scratch: Tensor,
    gradient: Tensor | None,
    gain: float,
) -> Tensor:
    """Statistics [STATS, rows] of a few rows; their gradient by the head's output, times `gain`, goes to `gradient`.

    logits, scratch: [rows, vocab] float32; both are overwritten. gradient: [rows, vocab] of the products' dtype, may
    be `logits`; None where it is not wanted.
    """
    _transform(logits, options)
    top, most_likely = logits.max(dim=-1)
    logits -= top[:, None]
    at_label = logits.gather(1, labels[:, None]).squeeze(1)
    exp = torch.exp(logits, out=scratch)
    total = exp.sum(dim=-1)
    log_total = total.log()
    ce = log_total - at_label
    p_correct = torch.exp(-ce)
    # -sum(p log p) = log-sum-exp - sum(p * logits)
    entropy = log_total - torch.linalg.vecdot(exp, logits) / total
    objective = OBJECTIVES[options.objective]
    weight = objective.weight(RowFacts(p_correct, ce, entropy, logits), options.given)
    scaled = weight if loss_weights is None else weight * loss_weights
    stats = torch.stack((ce * scaled, ce, p_correct, (most_likely == labels).float(), weight, entropy))
    if gradient is None:
        return stats
    step = scaled * (gain if options.logit_scale is None else gain * options.logit_scale)
    exp *= (step / total)[:, None]
    exp.scatter_(1, labels[:, None], (step * (p_correct - 1.0))[:, None])
    if options.softcap is not None:
        exp *= logits.add_(top[:, None]).div_(options.softcap).square_().neg_().add_(1.0)
    gradient.copy_(exp)
    return stats


class _Gradients(NamedTuple):
    """Float32, not yet scaled: [live, hidden_size], [vocab, hidden_size], [vocab]; None where not needed."""

    rows: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _zeros(needs: Sequence[bool], shapes: Sequence[Any], like: Tensor) -> _Gradients:
    pairs = zip(needs, shapes, strict=True)
    return _Gradients(*(like.new_zeros(shape, dtype=torch.float32) if needed else None for needed, shape in pairs))


class _Chunk(NamedTuple):
    """Some of the live rows, and what is known of them."""

    x: Tensor
    """[rows, hidden_size] of the products' dtype."""
    labels: Tensor
    loss_weights: Tensor | None
    part: slice
    """Which of the live rows."""


def _chunk_rows(live: int, vocab: int, device: torch.device) -> int:
    """Rows of a chunk: what a tile holds, or less where that makes as many chunks, all nearly equal; 0 for no rows."""
    most = max(1, _on(TILE_ELEMENTS, device) // vocab)
    return -(-live // -(-live // most)) if live else 0


def _chunks(
    hidden: Tensor, live: Tensor, labels: Tensor, loss_weights: Tensor | None, dtype: torch.dtype, size: int
) -> Iterator[_Chunk]:
    for start in range(0, len(live), max(size, 1)):
        part = slice(start, min(start + size, len(live)))
        weights = None if loss_weights is None else loss_weights[part]
        yield _Chunk(hidden[live[part]].to(dtype), labels[part], weights, part)


class _Tile:
    """The memory of one chunk: its logits, and their gradient in the products' dtype (in float32: in their place)."""

    def __init__(self, rows: int, weight: Tensor, dtype: torch.dtype, with_gradients: bool) -> None:
        vocab, device = len(weight), weight.device
        group = min(rows, max(1, _on(GROUP_ELEMENTS, device) // vocab))
        self.logits = torch.empty((rows, vocab), dtype=torch.float32, device=device)
        self.scratch = torch.empty((group, vocab), dtype=torch.float32, device=device)
        self.gradient = None
        if with_gradients:
            self.gradient = self.logits if dtype == torch.float32 else torch.empty_like(self.logits, dtype=dtype)

    def fill(self, chunk: _Chunk, weight: Tensor, bias: Tensor | None) -> None:
        """The head's output for the chunk."""
        logits = self.logits[: len(chunk.x)]
        for block, factor in _blocks(weight, chunk.x.dtype):
            _put_product(chunk.x, factor.T, logits[:, block])
        if bias is not None:
            logits += bias

    def weigh(self, chunk: _Chunk, options: HeadOptions, gain: float) -> Tensor:
        """From logits to gradient; the statistics [STATS, rows]."""
        stats = []
        for start in range(0, len(chunk.x), len(self.scratch)):
            some = slice(start, min(start + len(self.scratch), len(chunk.x)))
            weights = None if chunk.loss_weights is None else chunk.loss_weights[some]
            gradient = None if self.gradient is None else self.gradient[some]
            scratch = self.scratch[: some.stop - some.start]
            stats.append(_rows(self.logits[some], chunk.labels[some], weights, options, scratch, gradient, gain))
        return torch.cat(stats, dim=1)

    def add_to(self, made: _Gradients, chunk: _Chunk, weight: Tensor) -> None:
        """The other two products."""
        assert self.gradient is not None
        gradient = self.gradient[: len(chunk.x)]
        for block, factor in _blocks(weight, chunk.x.dtype):
            if made.rows is not None:
                _add_product(gradient[:, block], factor, made.rows[chunk.part])
            if made.weight is not None:
                _add_product(gradient[:, block].T, chunk.x, made.weight[block])
        if made.bias is not None:
            made.bias.add_(gradient.sum(dim=0, dtype=torch.float32))


class LinearLoss(torch.autograd.Function):
    """Sum of the weighted losses of the rows `live` of `hidden` [tokens, hidden_size].

    live: [live] int64; labels [live] int64, loss_weights [live] float32 or None: of those rows. weight: [vocab,
    hidden_size], bias: [vocab] or None. Returns (the sum, [STATS, live] statistics, not differentiable), float32.
    The weight is read in the forward pass alone, where ZeRO-3 holds all of it. One backward pass a forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        live: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None,
        options: HeadOptions,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = product_dtype(hidden, weight)
        gain = _FLOAT16_GAIN if dtype == torch.float16 else 1.0
        needs = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        made = _zeros(needs, ((len(live), hidden.shape[1]), weight.shape, len(weight)), hidden)
        stats = hidden.new_zeros((STATS, len(live)), dtype=torch.float32)
        size = _chunk_rows(len(live), len(weight), hidden.device)
        tile = _Tile(size, weight, dtype, any(needs))
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(hidden, live, labels, loss_weights, dtype, size):
                tile.fill(chunk, weight, bias)
                stats[:, chunk.part] = tile.weigh(chunk, options, gain)
                if any(needs):
                    tile.add_to(made, chunk, weight)
        ctx.save_for_backward(live, *made)
        ctx.gain = gain
        ctx.like = [tensor if tensor is None else (tensor.shape, tensor.dtype) for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(stats)
        return stats[0].sum(), stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        live, *made = ctx.saved_tensors
        scale = gradients[0] / ctx.gain
        # In place: a second copy of dW would be most of the memory. (torch refuses a second backward pass for it.)
        scaled = [
            None if tensor is None else tensor.mul_(scale).to(like[1])
            for tensor, like in zip(made, ctx.like, strict=True)
        ]
        if scaled[0] is not None:
            scaled[0] = scaled[0].new_zeros(ctx.like[0][0]).index_copy_(0, live, scaled[0])
        return (*scaled, None, None, None, None, None)
