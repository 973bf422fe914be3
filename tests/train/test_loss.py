"""Both ways of the loss against one that shares nothing with them: all logits in float64, one formula, autograd."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from dft_common.errors import SetupError
from dft_train import three_products
from dft_train.loss import linear_dft_loss
from dft_train.models.head import HeadTap, LossRequest
from dft_train.objectives import OBJECTIVES

OPTIONS = {
    "dft": {"dft_alpha": 0.7},
    "sft": {},
    "power": {"power_k": 1.5},
    "threshold": {"threshold_low": 0.02, "threshold_high": 0.35},
    "eaft": {"eaft_top_k": 5, "eaft_alpha": 2.0},
}


def row_weights(objective, p, logits, options):
    """[rows] float64, as the papers write them."""
    if objective == "dft":
        return options["dft_alpha"] * p + (1 - options["dft_alpha"])
    if objective == "power":
        return p ** options["power_k"]
    if objective == "threshold":
        return ((options["threshold_low"] <= p) & (p <= options["threshold_high"])).double()
    if objective == "eaft":
        k = min(options["eaft_top_k"], logits.shape[1])
        q = torch.sort(logits, dim=-1, descending=True).values[:, :k].softmax(-1)
        return ((-(q * q.log()).sum(-1)) / math.log(k)) ** options["eaft_alpha"]
    return torch.ones_like(p)


@dataclasses.dataclass
class Case:
    """A head and its inputs; `reference` and `ours` are (loss, sums, gradients of `leaves`)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    objective: str = "dft"
    options: dict = dataclasses.field(default_factory=dict)
    bias: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    count: float | None = None
    softcap: float | None = None
    scale: float | None = None

    @property
    def leaves(self):
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None and leaf.requires_grad]

    def reference(self):
        logits = self.hidden.double() @ self.weight.double().T
        logits = logits if self.bias is None else logits + self.bias.double()
        logits = logits if self.scale is None else logits * self.scale
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        live = self.labels != -100
        logits, labels = logits[live], self.labels[live]
        log_p = logits.log_softmax(-1)
        ce = -log_p[torch.arange(len(labels)), labels]
        p = torch.exp(-ce).detach()
        weights = row_weights(self.objective, p, logits.detach(), self.options)
        all_weights = weights if self.loss_weights is None else weights * self.loss_weights.double()[live]
        loss = (ce * all_weights).sum() / (max(int(live.sum()), 1) if self.count is None else self.count)
        entropy = -(log_p.exp() * log_p).sum()
        right = (logits.argmax(-1) == labels).sum() if len(labels) else torch.tensor(0)
        bins = torch.histc(p, 10, 0, 1)
        sums = ((ce * all_weights).sum(), ce.sum(), p.sum(), right, live.sum(), weights.sum(), entropy, bins)
        return loss, [value.detach() for value in sums], torch.autograd.grad(3 * loss, self.leaves)

    def gradients_of(self, *leaves):
        options = dict(self.options)
        alpha = options.pop("dft_alpha", 0.0)
        more = {"objective": self.objective, "dft_alpha": alpha, "objective_options": options}
        return torch.autograd.grad(3 * linear_dft_loss(self.hidden, self.weight, self.labels, **more)[0], leaves)

    def ours(self, fused):
        options = dict(self.options)
        loss, stats = linear_dft_loss(
            self.hidden, self.weight, self.labels, bias=self.bias, objective=self.objective,
            dft_alpha=options.pop("dft_alpha", 0.0), objective_options=options, loss_weights=self.loss_weights,
            num_valid_tokens=self.count, softcap=self.softcap, logit_scale=self.scale, fused=fused, per_token=True,
        )  # fmt: skip
        assert loss.dtype == torch.float32
        assert stats.tokens.ce.shape == self.labels.shape
        torch.testing.assert_close(stats.tokens.ce.sum(), stats.ce_sum)
        torch.testing.assert_close(stats.tokens.loss.sum(), stats.loss_sum)
        assert not stats.tokens.p_correct[self.labels == -100].any()
        return loss, list(stats[:8]), torch.autograd.grad(3 * loss, self.leaves)


def assert_right(case, fused="on"):
    (loss, sums, gradients), (expected, expected_sums, expected_gradients) = case.ours(fused), case.reference()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    for found, wanted in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=3e-5, atol=3e-5)
    for found, wanted, leaf in zip(gradients, expected_gradients, case.leaves, strict=True):
        assert found.dtype == leaf.dtype
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if leaf.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(found, wanted, check_dtype=False, **tolerance)


def make(tokens=23, vocab=37, width=8, *, seed=0, live=0.6, dtype=torch.float32, bias=False, weighted=False, **more):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, (tokens,), generator=random)
    labels[torch.rand(tokens, generator=random) >= live] = -100
    return Case(
        hidden=torch.randn(tokens, width, generator=random).to(dtype).requires_grad_(),
        weight=torch.randn(vocab, width, generator=random).to(dtype).requires_grad_(),
        labels=labels,
        bias=torch.randn(vocab, generator=random).to(dtype).requires_grad_() if bias else None,
        loss_weights=torch.rand(tokens, generator=random) + 0.1 if weighted else None,
        **{"options": OPTIONS[more.get("objective", "dft")], **more},
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks of 5 rows, groups of 2, casts of 3 rows of the weight, for a vocabulary of 37 and a width of 8."""
    monkeypatch.setitem(three_products.TILE_ELEMENTS, "cpu", 5 * 37)
    monkeypatch.setitem(three_products.GROUP_ELEMENTS, "cpu", 2 * 37)
    monkeypatch.setattr(three_products, "BLOCK_ELEMENTS", 3 * 8)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(2, 70),
    width=st.integers(1, 20),
    live=st.sampled_from([0.0, 0.3, 1.0]),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    weighted=st.booleans(),
    count=st.sampled_from([None, 17.0]),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([None, 0.25]),
    tile=st.sampled_from([1, 64, 1 << 20]),
    fused=st.sampled_from(["on", "on", "off"]),
    seed=st.integers(0, 1000),
)
def test_loss_statistics_and_gradients_are_those_of_the_plain_way(objective, alpha, tile, fused, **more):
    options = {"dft_alpha": alpha} if objective == "dft" else OPTIONS[objective]
    old = dict(three_products.TILE_ELEMENTS)
    three_products.TILE_ELEMENTS["cpu"] = tile
    try:
        assert_right(make(objective=objective, options=options, **more), fused)
    finally:
        three_products.TILE_ELEMENTS.update(old)


CONDITIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"scale": 0.3},
    "all_three": {"bias": True, "softcap": 3.0, "scale": 0.3},
    "loss_weights": {"weighted": True},
    "bfloat16": {"dtype": torch.bfloat16, "bias": True},
    "all_dead": {"live": 0.0, "bias": True},
    "all_live": {"live": 1.0},
    "one_chunk_exactly": {"live": 1.0, "tokens": 5},
    "one_row_more": {"live": 1.0, "tokens": 6},
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_under_every_condition(objective, condition, small_tiles):
    case = make(objective=objective, **CONDITIONS[condition])
    assert_right(case, "on")
    assert_right(case, "off")


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_frozen_head_gets_no_gradient_and_changes_no_other(objective, small_tiles):
    case = make(objective=objective)
    _, _, (whole, _) = case.ours("on")
    case.weight.requires_grad_(False)
    assert_right(case)
    torch.testing.assert_close(case.ours("on")[2][0], whole, rtol=0, atol=0)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_tied_head_gets_the_gradients_of_both_its_uses(objective, small_tiles):
    case = make(objective=objective)
    ids = torch.arange(len(case.labels)) % len(case.weight)
    hidden = torch.tanh(case.weight[ids])
    apart = dataclasses.replace(case, hidden=hidden.detach().requires_grad_())
    by_hidden, by_head = apart.reference()[2]
    (through,) = torch.autograd.grad(hidden, case.weight, by_hidden.float())
    (found,) = dataclasses.replace(case, hidden=torch.tanh(case.weight[ids])).gradients_of(case.weight)
    torch.testing.assert_close(found, through + by_head.float(), rtol=1e-4, atol=1e-5)


def test_the_weight_is_held_constant():
    """With p_correct in the graph, the gradient would be another one."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8)
    labels = torch.tensor([1, 2, 3, 4])
    for fused in ("on", "off"):
        (ours,) = torch.autograd.grad(linear_dft_loss(hidden, weight, labels, dft_alpha=1.0, fused=fused)[0], hidden)
        ce = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
        (through,) = torch.autograd.grad((ce * torch.exp(-ce)).mean(), hidden, retain_graph=True)
        (held,) = torch.autograd.grad((ce * torch.exp(-ce).detach()).mean(), hidden)
        torch.testing.assert_close(ours, held)
        assert not torch.allclose(ours, through, rtol=1e-2)


@pytest.mark.parametrize("live", [0, 3])
@pytest.mark.parametrize("fused", ["on", "off"])
def test_alpha_zero_is_transformers_own_loss(live, fused):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
    labels = torch.tensor([5, 3, 8, 1, 0, 2])
    labels[live:] = -100
    count = max(live, 1)
    ours, _ = linear_dft_loss(hidden, weight, labels, dft_alpha=0.0, num_valid_tokens=count, fused=fused)
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


def test_no_gradients_are_made_in_evaluation(monkeypatch):
    def refuse(*_):
        raise AssertionError("a product of a gradient")

    monkeypatch.setattr(three_products, "_add_product", refuse)
    case = make()
    with torch.no_grad():
        loss, _ = linear_dft_loss(case.hidden, case.weight, case.labels)
    assert not loss.requires_grad


class Sizes(TorchDispatchMode):
    """The most elements of any tensor made, and of those that are float32 copies of a weight's size."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.made.append((tensor.shape, tensor.dtype))
        return out


def sizes(case, fused):
    with Sizes() as mode:
        loss, _ = linear_dft_loss(case.hidden, case.weight, case.labels, fused=fused)
        loss.backward()
    return mode.made


def test_no_tensor_of_all_logits_is_ever_made(monkeypatch):
    tokens, vocab = 64, 1000
    monkeypatch.setitem(three_products.TILE_ELEMENTS, "cpu", 4 * vocab)
    largest = {fused: max(math.prod(shape) for shape, _ in sizes(make(tokens, vocab, live=0.5), fused))
               for fused in ("on", "off")}  # fmt: skip
    assert largest["on"] <= vocab * 8 and largest["off"] >= tokens * vocab


def test_a_16_bit_weight_is_never_copied_whole_into_float32(small_tiles):
    case = make(dtype=torch.bfloat16)
    case.weight.requires_grad_(False)
    float32 = [shape for shape, dtype in sizes(case, "on") if dtype == torch.float32]
    assert max(math.prod(shape) for shape in float32 if shape[-1:] == (8,)) < case.weight.numel()


def test_a_second_backward_pass_is_refused():
    """The gradients are handed on, not copied: scaling them once more would be wrong, and torch says so."""
    case = make()
    loss, _ = linear_dft_loss(case.hidden, case.weight, case.labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fused", ["on", "off"])
def test_enormous_logits_neither_overflow_nor_vanish(fused):
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[2e4], [-2e4], [0.0]], requires_grad=True)
    loss, stats = linear_dft_loss(hidden, weight, torch.tensor([0, 0]), objective="sft", fused=fused)
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and stats.correct == 1 and stats.entropy_sum == 0
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_products_of_16_bits_with_float32_sums_lose_only_rounding(dtype, monkeypatch, small_tiles):
    """A GPU's way, with a CPU's product in the place of the two that only CUDA has."""

    def put(a, b, out):
        assert a.dtype == b.dtype == dtype and out.dtype == torch.float32
        out.copy_(a.float() @ b.float())

    def add(a, b, out):
        assert a.dtype == b.dtype == dtype and out.dtype == torch.float32
        out.add_(a.float() @ b.float())

    monkeypatch.setattr(three_products, "product_dtype", lambda rows, weight: dtype)
    monkeypatch.setattr(three_products, "_put_product", put)
    monkeypatch.setattr(three_products, "_add_product", add)
    # Under autocast the weight is float32, and cast block by block.
    for weights in (dtype, torch.float32):
        case = make(dtype=dtype, bias=True, softcap=3.0, weighted=True)
        case.weight = case.weight.detach().to(weights).to(dtype).to(weights).requires_grad_()
        (loss, _, gradients), (expected, _, wanted) = case.ours("on"), case.reference()
        torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
        for ours, theirs in zip(gradients, wanted, strict=True):
            assert (ours.double() - theirs).norm() / theirs.norm() < 5e-3


def test_the_products_that_only_cuda_has_are_called_as_torch_takes_them():
    a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 4), (4, 5)))
    out = torch.empty((3, 5), device="meta")
    three_products._put_product(a, b, out)
    three_products._add_product(a, b, out)


def test_halves_are_multiplied_as_they_are_where_the_device_can(monkeypatch):
    class Stand(tuple):
        device = torch.device("cuda")

    def on_gpu(dtype):
        stand = Stand()
        stand.dtype = dtype
        return stand

    choose = three_products.product_dtype
    monkeypatch.setattr(three_products, "sums_halves", lambda device, dtype: False)
    assert choose(on_gpu(torch.bfloat16), on_gpu(torch.bfloat16)) == torch.float32
    monkeypatch.setattr(three_products, "sums_halves", lambda device, dtype: True)
    assert choose(on_gpu(torch.bfloat16), on_gpu(torch.bfloat16)) == torch.bfloat16
    assert choose(on_gpu(torch.float32), on_gpu(torch.bfloat16)) == torch.float32
    assert choose(on_gpu(torch.float32), on_gpu(torch.float32)) == torch.float32
    assert choose(torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)) == torch.float32


def test_a_device_is_asked_whether_it_adds_halves_to_float32(monkeypatch):
    """A CPU cannot, as ROCm's builds could not: it refuses, which is no error."""
    ask, cpu = three_products.sums_halves.__wrapped__, torch.device("cpu")
    assert not ask(cpu, torch.bfloat16)
    assert ask(cpu, torch.float32)
    # One that puts the product in the place of the sum.
    monkeypatch.setattr(three_products, "_add_product", three_products._put_product)
    assert not ask(cpu, torch.float32)


class Adapted(nn.Module):
    """A head that is more than a linear layer, as an adapter makes it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.more = inner, nn.Linear(inner.in_features, inner.out_features)

    def forward(self, hidden):
        return self.inner(hidden) + self.more(hidden)


def test_a_head_that_is_more_than_a_linear_layer_computes_its_own_logits(qwen3):
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    net.set_output_embeddings(Adapted(net.get_output_embeddings()))
    ids = torch.arange(20, 32)[None]
    labels = ids.clone()
    labels[:, :5] = -100
    logits = net(input_ids=ids).logits[0, 4:-1].double()
    ce = torch.nn.functional.cross_entropy(logits, labels[0, 5:], reduction="sum")
    tap = HeadTap(net)
    request = LossRequest(labels, None, 1.0, "sft", 0.0)
    loss, _ = tap.loss(net, {"input_ids": ids}, request)
    assert loss.item() == pytest.approx(ce.item(), rel=1e-5)
    loss.backward()
    assert tap.head.more.weight.grad.abs().sum() > 0
    with pytest.raises(SetupError, match="--fused_loss on: the model's head is Adapted"):
        tap.loss(net, {"input_ids": ids}, request._replace(fused="on"))
