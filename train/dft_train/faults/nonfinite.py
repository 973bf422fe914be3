"""A step whose loss or gradient is NaN or infinite is never applied: its rows are named, then --on_nan decides.

`stop` ends the run with the weights of the step before; `skip` goes on without the step, as loss scaling does: the
optimizer's moments and the learning rate stay where they were. What tells is the gradient's norm, which is the same
on every rank and is read once a step. Used by `faults`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dft_common import logs
from dft_common.errors import DataError
from dft_train.checkpoints.whole import last_whole
from dft_train.faults.trace import Micro, RowNames, StepTrace, Suspect
from dft_train.ranks.agree import Agreement

MOST_IN_A_ROW = 10
"""Steps that --on_nan skip leaves out one after the other before it gives up."""
_ROWS_SHOWN = 5
_LOWEST_SCALE = 1.0
"""A GradScaler halves without end; below this, scaling does not help any more."""


class Step(Protocol):
    """How an optimizer step is left out."""

    def was_left_out(self, norm: float | None) -> bool:
        """Whether this step is not, or must not be, applied. `norm` of the gradients, None where it is not known."""
        ...

    def leave_out(self) -> None: ...

    def overflow_is_usual(self) -> bool:
        """Whether a gradient that is not finite may be no more than a loss scale still too high."""
        ...


class PlainStep:
    """Without DeepSpeed: asked between the backward pass and the optimizer's step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def was_left_out(self, norm: float | None) -> bool:
        left_out = norm is not None and not math.isfinite(norm)
        if self._trainer.accelerator.scaler is None:
            # accelerate's word for it, by which Trainer leaves the schedule where it is; a scaler sets it by itself.
            self._trainer.optimizer._is_overflow = left_out
        return left_out

    def leave_out(self) -> None:
        if self._trainer.accelerator.scaler is None:
            # An optimizer passes over parameters without a gradient.
            for group in self._trainer.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def overflow_is_usual(self) -> bool:
        scaler = self._trainer.accelerator.scaler
        return scaler is not None and scaler.get_scale() > _LOWEST_SCALE


class DeepSpeedStep:
    """With DeepSpeed: asked after its step, which it has left out by itself."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._dropped = False
        optimizer = engine.optimizer
        if hasattr(optimizer, "check_grad_overflow"):
            # `bf16.check_grad_overflow: false` would let NaN into the weights.
            optimizer.check_grad_overflow = True
        if hasattr(getattr(optimizer, "loss_scaler", None), "raise_error_at_min_scale"):
            optimizer.loss_scaler.raise_error_at_min_scale = False
        if not hasattr(optimizer, "overflow"):
            # Stage 0 in float32: torch's own optimizer.
            optimizer.register_step_pre_hook(self._drop)

    def _drop(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._dropped = not math.isfinite(float(torch.nn.utils.get_total_norm(gradients)))
        if self._dropped:
            for parameter in parameters:
                parameter.grad = None

    def was_left_out(self, norm: float | None) -> bool:
        return self._dropped or bool(getattr(self._engine.optimizer, "overflow", False))

    def leave_out(self) -> None:
        pass

    def overflow_is_usual(self) -> bool:
        optimizer = self._engine.optimizer
        scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
        if not self._engine.fp16_enabled() or scaler is None:
            return False
        dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
        lowest = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None) or _LOWEST_SCALE
        return bool(dynamic) and scaler.cur_scale > lowest


class Finding(NamedTuple):
    """What one micro-batch of one rank has to do with it."""

    rank: int
    micro: int
    loss: float
    """Times the number of ranks; finite where only its gradient is not."""
    rows: list[Suspect]


def _read(flags: Tensor | None) -> np.ndarray | None:
    """[tokens] bool on the CPU, None where no token stands out."""
    found = None if flags is None else flags.cpu().numpy()
    return found if found is not None and found.any() else None


def findings(micros: Sequence[Micro], names: RowNames, rank: int) -> list[Finding]:
    """The micro-batches of this rank that were not finite. Waits for the device."""
    found = []
    for number, micro in enumerate(micros):
        loss, top, bottom = micro.loss_value(), _read(micro.top), _read(micro.bottom)
        if math.isfinite(loss) and top is None and bottom is None:
            continue
        tokens = top if top is not None else bottom if math.isfinite(loss) else None
        found.append(Finding(rank, number, loss, names.name(number, micro.packs, tokens)))
    return found


def describe(step: int, found: Sequence[Finding], count: int) -> str:
    """What happened at `step`, and with which rows; `count` micro-batches on each rank."""
    losses = [finding.loss for finding in found if not math.isfinite(finding.loss)]
    what = f"the loss is {losses[0]}" if losses else "the loss is finite, but its gradient is not"
    lines = [f"step {step}: {what}; the step is not applied, the weights stay those of step {step - 1}"]
    # Where losses are not finite, gradients elsewhere that are not are their consequence.
    causes = [finding for finding in found if not math.isfinite(finding.loss)] or list(found)
    rows = [(finding, row) for finding in causes for row in finding.rows]
    for finding, row in rows[:_ROWS_SHOWN]:
        lines.append(
            f"  rank {finding.rank}, micro-batch {finding.micro + 1} of {count}, pack {row.pack}, row {row.row} "
            f"(source {row.source}, id {row.id}): {row.text!r}"
        )
    if len(rows) > _ROWS_SHOWN:
        lines.append(f"  and {len(rows) - _ROWS_SHOWN} more rows")
    if not rows:
        lines.append("  no single row stands out: it came up where the gradients are added up")
    return "\n".join(lines)


def _how_to_go_on(output_dir: Path) -> str:
    checkpoint = last_whole(output_dir)
    if checkpoint is None:
        return "there is no checkpoint yet, so the run starts anew"
    return f"the last whole checkpoint is {checkpoint}: --resume_from_checkpoint True goes on from it"


class NonFinite:
    """Counts, names and decides. The same on every rank."""

    def __init__(
        self, *, on_nan: str, trace: StepTrace, names: RowNames, agreement: Agreement, rank: int, output_dir: Path
    ) -> None:
        self.skipped = 0
        self._in_a_row = 0
        self._on_nan = on_nan
        self._trace = trace
        self._names = names
        self._agreement = agreement
        self._rank = rank
        self._output_dir = output_dir

    def leaves_out(self, step: int, norm: float | None, how: Step) -> bool:
        """Whether optimizer step `step` (from 1) is not applied. Raises DataError where that ends the run."""
        if not how.was_left_out(norm):
            self._in_a_row = 0
            return False
        if how.overflow_is_usual() and not self._any_loss_is_bad():
            return True
        how.leave_out()
        own = findings(self._trace.micros, self._names, self._rank)
        found = [finding for rank in self._agreement.gather(own) for finding in rank]
        self._decide(step, describe(step, found, len(self._trace.micros)))
        return True

    def _any_loss_is_bad(self) -> bool:
        bad = any(not math.isfinite(micro.loss_value()) for micro in self._trace.micros)
        return any(self._agreement.gather(bad))

    def _decide(self, step: int, what: str) -> None:
        if self._on_nan == "stop":
            raise DataError(
                what,
                remedy="look at the rows with `dft-prep inspect DATASET --row N`. If they are ordinary, lower "
                "--learning_rate, or load the model with --torch_dtype float32; --on_nan skip leaves such steps out. "
                + _how_to_go_on(self._output_dir),
            )
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise DataError(
                f"{MOST_IN_A_ROW} steps in a row were not finite; the last one:\n{what}",
                remedy="it is not single rows then: lower --learning_rate, raise --warmup_ratio, or look whether the "
                "model's weights are finite. " + _how_to_go_on(self._output_dir),
            )
        if self._rank == 0:
            logs.get_logger().warning("%s\n  left out by --on_nan skip (%d so far)", what, self.skipped)
