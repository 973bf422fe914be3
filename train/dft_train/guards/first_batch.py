"""Two checks at the first batch of a run, in seconds: the loss, and that packed conversations do not see each other.

On an excerpt of the batch (at most 4 slices of 512 tokens, 256 live rows) in the run's own precision and parallelism:

1. `probe` learns what the model does to its head's output. Then the run's loss and its gradients by the hidden states
   and the head are held against the objective computed densely, in float32, and that against the model's own logits.
2. `probe.measure_leak`: the slices packed together, with others changed, and each alone.

Nothing of the run changes: no gradient is left, no random number is drawn, every module keeps its mode. The verdict
is kept in the run's directory, so that a resumed run with nothing changed is not asked again. Called by `loop`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from dft_common.errors import SetupError
from dft_common.fingerprint import hash_object
from dft_common.logs import get_logger
from dft_common.manifest import encode_json, write_atomically
from dft_common.schema import IGNORE_INDEX
from dft_train.data.collate import Batch
from dft_train.guards.probe import (
    Inputs,
    Leak,
    LogitTransform,
    evaluating,
    has_experts,
    inputs_for,
    measure_leak,
    probe_logits,
    probe_packing,
    refuse_leak,
)
from dft_train.loss import linear_dft_loss, logits_dft_loss, transformed
from dft_train.models.head import HeadTap, LossRequest, shift
from dft_train.ranks.launch import have_met
from dft_train.three_products import product_dtype

FILE_NAME = "guards.json"
_SLICES, _TOKENS, _LIVE = 4, 512, 64
"""Slices of an excerpt, and the most tokens and live labels of each."""
_TOLERANCE = {"loss": (1e-4, 1e-4), "gradient": (1e-3, 0.02), "logits": (1e-3, 0.03)}
"""Relative, in float32 and in 16 bits. Dense and run's loss are both float32 sums of the same products (measured 1e-7);
gradients pass through 16-bit tiles on a GPU (one rounding: 2^-9), the model's own logits through two roundings."""


class Numbers(NamedTuple):
    """What was measured, all relative; the largest over the ranks."""

    loss: float
    """Between the run's loss and the dense one."""
    gradient: float
    """Of the gradients by the hidden states and the head's weight, by norm."""
    logits: float
    """Between the model's own logits and those that the dense loss is made of, by norm."""
    others: float
    alone: float
    """See `probe.Leak`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """What the checks need of a run."""

    tap: HeadTap
    config: Any
    attention: str
    device: torch.device
    dtype: torch.dtype
    """What the model computes in."""
    packs_share: bool
    """Whether any sequence holds more than one conversation."""
    directory: Path
    key: Mapping[str, Any]
    """What the verdict depends on; when any of it changes, the checks are made again."""


class _Excerpt(NamedTuple):
    """Some sequences of a batch, joined: [1, tokens] each, as in `Batch`."""

    sequences: list[list[int]]
    labels: Tensor
    loss_weights: Tensor | None


def _cut(batch: Batch) -> list[slice]:
    """Up to _SLICES stretches of the batch's slices, those with live labels first, each ending at its last label."""
    positions, labels = batch.inputs["position_ids"], batch.labels[0].tolist()
    assert isinstance(positions, Tensor)
    starts = [at for at, position in enumerate(positions[0].tolist()) if position == 0]
    found = []
    for start, end in zip(starts, [*starts[1:], len(labels)], strict=True):
        live = [at for at in range(start + 1, end) if labels[at] != IGNORE_INDEX][:_LIVE]
        stop = live[-1] + 1 if live else end
        found.append((not live, slice(max(start, stop - _TOKENS), stop)))
    stretches = [stretch for _, stretch in sorted(found, key=lambda pair: pair[0])[:_SLICES]]
    if len(stretches) == 1 and stretches[0].stop - stretches[0].start > 3:
        middle = (stretches[0].start + stretches[0].stop) // 2
        stretches = [slice(stretches[0].start, middle), slice(middle, stretches[0].stop)]
    # Always as many, so that all ranks make the same forward passes.
    return [stretches[at % len(stretches)] for at in range(_SLICES)]


def _excerpt(batch: Batch) -> _Excerpt:
    stretches = _cut(batch)
    ids = batch.inputs["input_ids"]
    assert isinstance(ids, Tensor)
    labels = [batch.labels[:, part].clone() for part in stretches]
    for part in labels:
        part[:, 0] = IGNORE_INDEX
    weights = batch.loss_weights
    return _Excerpt(
        sequences=[ids[0, part].tolist() for part in stretches],
        labels=torch.cat(labels, dim=1),
        loss_weights=None if weights is None else torch.cat([weights[:, part] for part in stretches], dim=1),
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))


def _dense(
    rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: Mapping[str, Any], factors: torch.dtype
) -> Any:
    """(loss, gradient by rows, gradient by weight, logits): the objective of all logits, in float32. factors: what the
    run rounds the products' factors to (under autocast they are float32, and a GPU multiplies 16 bits)."""
    with torch.enable_grad(), torch.autocast(rows.device.type, enabled=False):
        x, w = (tensor.detach().to(factors).float().requires_grad_() for tensor in (rows, weight))
        logits = torch.nn.functional.linear(x, w, None if bias is None else bias.detach().float())
        loss, _ = logits_dft_loss(logits, labels, **options)
        by_rows, by_weight = torch.autograd.grad(loss, (x, w))
    return loss.detach(), by_rows, by_weight, logits.detach()


def _run_loss(
    rows: Tensor, head: Any, labels: Tensor, options: Mapping[str, Any], fused: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as the run computes it; no gradient reaches the parameters."""
    with torch.enable_grad():
        x, w = rows.detach().requires_grad_(), head.weight.detach().requires_grad_()
        bias = None if head.bias is None else head.bias.detach()
        loss, _ = linear_dft_loss(x, w, labels, bias=bias, fused=fused, **options)
        by_rows, by_weight = torch.autograd.grad(loss, (x, w))
    return loss.detach(), by_rows, by_weight


def measure_loss(
    tap: HeadTap, model: Any, inputs: dict[str, Any], excerpt: _Excerpt, request: LossRequest
) -> tuple[float, float, float]:
    """(loss, gradient, logits) of `Numbers`, in one forward pass. `request` as the run makes it, for its options."""
    labels = shift(excerpt.labels, IGNORE_INDEX)
    live = torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
    weights = None if excerpt.loss_weights is None else shift(excerpt.loss_weights, 0.0)[live]
    # One row at least, so that the model has a logit to make; its label is dead.
    chosen = live if len(live) else torch.zeros(1, dtype=torch.int64, device=labels.device)
    names = ("objective", "dft_alpha", "objective_options", "softcap", "logit_scale")
    options = {name: getattr(request, name) for name in names}
    options |= {"loss_weights": weights if len(live) else None, "num_valid_tokens": float(len(chosen))}
    dense: list[Any] = []
    found: list[float] = []

    def reply(hidden: Tensor) -> Tensor:
        rows = hidden[0, chosen]
        own = tap.own_output(hidden[:, chosen])
        if tap.plain and bool(hidden.isfinite().all()):
            factors = torch.float32 if request.fused == "off" else product_dtype(rows, tap.head.weight)
            dense[:] = _dense(rows, tap.head.weight, tap.head.bias, labels[chosen], options, factors)
            loss, by_rows, by_weight = _run_loss(rows, tap.head, labels[chosen], options, request.fused)
            found[:] = [_relative(loss, dense[0]), max(_relative(by_rows, dense[1]), _relative(by_weight, dense[2]))]
        return own

    with torch.no_grad():
        tap.run(model, inputs, reply)
    if not found or not len(live):
        return 0.0, 0.0, 0.0
    assert tap.logits is not None
    expected = transformed(dense[3], request.softcap, request.logit_scale)
    return found[0], found[1], _relative(tap.logits[0], expected)


def _worst(numbers: Numbers, device: torch.device) -> Numbers:
    """Over the ranks, all of which get the same. What is not a number is not ours to judge: it counts 0."""
    made = torch.tensor(numbers, device=device).nan_to_num(nan=0.0, posinf=0.0)
    if have_met():
        dist.all_reduce(made, op=dist.ReduceOp.MAX)
    return Numbers(*made.tolist())


def _refuse(numbers: Numbers, guard: Guard) -> None:
    """Raise SetupError where a difference is above its tolerance."""
    half = guard.dtype != torch.float32
    precision = str(guard.dtype).removeprefix("torch.")
    what = {
        "loss": "the run's loss differs from the objective computed from all logits",
        "gradient": "the gradients of the run's loss differ from those of the objective computed from all logits",
        "logits": "the model's own logits are not those that the loss is computed from",
    }
    remedies = {
        "logits": "this model does something after its head that the loss does not know: it cannot be trained here",
    }
    for name, text in what.items():
        found, most = getattr(numbers, name), _TOLERANCE[name][half]
        if found > most:
            raise SetupError(
                f"on the first batch, {text}: by {found:.2g} (relative; {most:.2g} is allowed in {precision})",
                remedy=remedies.get(name, "use `--fused_loss off`, the dense way, and please report it"),
            )
    refuse_leak(Leak(numbers.others, numbers.alone), guard.dtype, experts=has_experts(guard.config))


def _known(guard: Guard) -> bool:
    """Whether every rank finds this verdict in the run's directory."""
    try:
        same = msgspec.json.decode((guard.directory / FILE_NAME).read_bytes()).get("key") == hash_object(guard.key)
    except (OSError, msgspec.MsgspecError, AttributeError):
        same = False
    if not have_met():
        return same
    found = torch.tensor(float(same), device=guard.device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return bool(found)


def _keep(guard: Guard, numbers: Numbers) -> None:
    guard.directory.mkdir(parents=True, exist_ok=True)
    verdict = {"key": hash_object(guard.key), "of": guard.key, "numbers": numbers._asdict()}
    write_atomically(guard.directory / FILE_NAME, encode_json(verdict))


def check_excerpt(guard: Guard, model: Any, inputs: Inputs, batch: Batch, request: LossRequest) -> Numbers:
    """Measure, and raise SetupError (on every rank alike) where something differs. `model` in evaluation mode."""
    excerpt = _excerpt(batch)
    own = measure_loss(guard.tap, model, inputs(excerpt.sequences), excerpt, request)
    leak = Leak(0.0, 0.0)
    if guard.packs_share:
        rows = guard.config.get_text_config().vocab_size
        leak = measure_leak(guard.tap, model, inputs, excerpt.sequences, rows)
    numbers = _worst(Numbers(*own, *leak), guard.device)
    _refuse(numbers, guard)
    return numbers


def ask_model(guard: Guard, model: Any, batch: Batch, request: LossRequest, *, full: bool) -> LogitTransform:
    """What the model does to its head's output, after the checks. model: as it is trained, wrapped. request: that of
    `batch`. full: both checks; without, only whether a few fixed tokens see each other. Raises SetupError."""
    started = time.monotonic()
    inputs = inputs_for(guard.attention, guard.device)
    with evaluating(model):
        found = probe_logits(guard.tap, model, guard.config, inputs)
        if not full:
            if guard.packs_share:
                probe_packing(guard.tap, model, inputs, guard.dtype)
            return found
        if _known(guard):
            return found
        request = request._replace(**found._asdict())
        numbers = check_excerpt(guard, model, inputs, batch, request)
    if not have_met() or dist.get_rank() == 0:
        _keep(guard, numbers)
    packed = f"; packed and single differ by {numbers.alone:.1g}" if guard.packs_share else ""
    get_logger().info(
        "guards: the loss agrees with the model's own logits to %.1g, its gradients to %.1g%s (%.1f s)",
        max(numbers.loss, numbers.logits),
        numbers.gradient,
        packed,
        time.monotonic() - started,
    )
    return found


def verdict_key(config: Any, *, args: Any, attention: str, dtype: torch.dtype, request: LossRequest) -> dict[str, Any]:
    """What a verdict depends on."""
    import transformers

    plugin = args.deepspeed_plugin if args.deepspeed else None
    zero = (plugin.deepspeed_config if plugin is not None else {}).get("zero_optimization", {})
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type
    return {
        "model": hash_object({k: str(v) for k, v in sorted(config.to_dict().items()) if k != "_name_or_path"}),
        "attention": attention,
        "dtype": str(dtype),
        "device": device,
        "zero_stage": zero.get("stage", 0),
        "objective": request.objective,
        "objective_options": {name: float(value) for name, value in request.objective_options.items()},
        "fused_loss": request.fused,
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
