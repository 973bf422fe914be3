"""The loss against the plain way: all logits, autograd, one formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from dft_train import loss as loss_module
from dft_train.loss import OBJECTIVES, linear_dft_loss


def eager(hidden, weight, labels, *, bias, alpha, objective, loss_weights, count, softcap, scale):
    logits = hidden.float() @ weight.float().T
    if bias is not None:
        logits = logits + bias.float()
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    live = labels != -100
    ce = torch.nn.functional.cross_entropy(logits[live], labels[live], reduction="none")
    p = torch.exp(-ce).detach()
    weights = p * alpha + 1 - alpha if objective == "dft" else torch.ones_like(p)
    if loss_weights is not None:
        weights = weights * loss_weights[live]
    return (ce * weights).sum() / (count if count is not None else max(int(live.sum()), 1)), ce, p


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(2, 70),
    width=st.integers(1, 20),
    live_share=st.sampled_from([0.0, 0.3, 1.0]),
    alpha=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_bias=st.booleans(),
    with_weights=st.booleans(),
    count=st.sampled_from([None, 17.0]),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([None, 0.25]),
    chunk=st.sampled_from([1, 64, 1 << 20]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_are_those_of_the_plain_way(
    tokens,
    vocab,
    width,
    live_share,
    alpha,
    objective,
    dtype,
    with_bias,
    with_weights,
    count,
    softcap,
    scale,
    chunk,
    seed,
):
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=make).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=make).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=make).to(dtype).requires_grad_() if with_bias else None
    labels = torch.randint(0, vocab, (tokens,), generator=make)
    labels[torch.rand(tokens, generator=make) >= live_share] = -100
    loss_weights = torch.rand(tokens, generator=make) + 0.1 if with_weights else None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    old, loss_module.CHUNK_ELEMENTS = loss_module.CHUNK_ELEMENTS, chunk
    try:
        found, stats = linear_dft_loss(
            hidden, weight, labels, bias=bias, objective=objective, dft_alpha=alpha, loss_weights=loss_weights,
            num_valid_tokens=count, softcap=softcap, logit_scale=scale, per_token=True,
        )  # fmt: skip
    finally:
        loss_module.CHUNK_ELEMENTS = old
    expected, ce, p = eager(
        hidden, weight, labels, bias=bias, alpha=alpha, objective=objective, loss_weights=loss_weights, count=count,
        softcap=softcap, scale=scale,
    )  # fmt: skip
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(stats.ce_sum, ce.sum().detach(), rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(stats.p_correct_sum, p.sum(), rtol=2e-5, atol=1e-5)
    assert stats.live == (labels != -100).sum()
    assert stats.tokens is not None and stats.tokens.ce.shape == labels.shape
    torch.testing.assert_close(stats.tokens.ce.sum(), stats.ce_sum)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_the_weight_is_held_constant():
    """With p_correct in the graph, the gradient would be another one."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8)
    labels = torch.tensor([1, 2, 3, 4])
    (ours,) = torch.autograd.grad(linear_dft_loss(hidden, weight, labels, dft_alpha=1.0)[0], hidden)
    ce = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    (through,) = torch.autograd.grad((ce * torch.exp(-ce)).mean(), hidden, retain_graph=True)
    (held,) = torch.autograd.grad((ce * torch.exp(-ce).detach()).mean(), hidden)
    torch.testing.assert_close(ours, held)
    assert not torch.allclose(ours, through, rtol=1e-2)


@pytest.mark.parametrize("live", [0, 3])
def test_alpha_zero_is_transformers_own_loss(live):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
    labels = torch.tensor([5, 3, 8, 1, 0, 2])
    labels[live:] = -100
    count = max(live, 1)
    ours, _ = linear_dft_loss(hidden, weight, labels, dft_alpha=0.0, num_valid_tokens=count)
    theirs = ForCausalLMLoss(
        (hidden @ weight.T)[None],
        None,
        vocab_size=11,
        num_items_in_batch=torch.tensor(count),
        shift_labels=labels[None],
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.backward()
    assert hidden.grad is not None


def test_no_gradients_are_made_in_evaluation():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    with torch.no_grad():
        loss, _ = linear_dft_loss(hidden, weight, torch.arange(6))
    assert not loss.requires_grad
