"""Asks the model itself, before the first batch, what the loss and the packing rely on. Called by `loop`.

1. What happens to the head's output before the softmax: nothing, a factor (Cohere, Granite, Falcon-H1), or a
   soft cap (Gemma). Known numbers go in as the head's output, and what comes out tells.
2. That a packed conversation does not see the one before it: the last hidden states of a short sequence must be
   the same alone and behind another. Models that carry a state along (linear attention, convolutions) fail here.
Two forward passes of a few tokens, in the run's own precision and parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dft_common.errors import SetupError
from dft_train.collate import sequence_inputs
from dft_train.head import HeadTap

_NUMBERS = (-40.0, -3.0, -0.5, 0.25, 1.0, 7.0, 60.0)
_EXACT = 1e-5
"""Relative: the numbers pass in float32."""
_LEAK = {torch.float32: 1e-3}
_LEAK_HALF = 0.1
"""Relative norm of the difference above which a slice is taken to see another: far above rounding, far below a leak."""

Inputs = Callable[[Sequence[Sequence[int]]], dict[str, Any]]
"""From sequences of token ids to the model's inputs for them, packed into one."""


class LogitTransform(NamedTuple):
    """`softcap * tanh(logit_scale * x / softcap)`, as the model does after its head."""

    softcap: float | None = None
    logit_scale: float | None = None


def _transform(before: Tensor, after: Tensor, softcap: float | None) -> LogitTransform | None:
    """The transform that turned `before` into `after` ([numbers] float64), None where it is not a known one."""
    ratio = after / before
    factor = float(ratio[-1])
    if bool(((ratio - factor).abs() <= _EXACT * abs(factor)).all()):
        return LogitTransform(logit_scale=None if abs(factor - 1.0) <= _EXACT else factor)
    if softcap and torch.allclose(after, torch.tanh(before / softcap) * softcap, rtol=_EXACT, atol=_EXACT):
        return LogitTransform(softcap=softcap)
    return None


def probe_logits(tap: HeadTap, model: Any, config: Any, inputs: Inputs) -> LogitTransform:
    """What the model does to its head's output. Raises SetupError where the loss does not know it."""

    def reply(hidden: Tensor) -> Tensor:
        return torch.tensor(_NUMBERS, dtype=torch.float32, device=hidden.device).reshape(1, 1, -1)

    with torch.no_grad():
        tap.run(model, inputs([(0, 1, 2)]), reply)
    assert tap.logits is not None
    before = torch.tensor(_NUMBERS, dtype=torch.float64)
    after = tap.logits.reshape(-1).double().cpu()
    softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    found = _transform(before, after, softcap)
    if found is None:
        raise SetupError(
            f"this model changes its logits in a way that the loss does not know: {before.tolist()} became "
            f"{[round(value, 4) for value in after.tolist()]}",
            remedy="known are a constant factor and config.final_logit_softcapping",
        )
    return found


def _last_hidden(tap: HeadTap, model: Any, inputs: dict[str, Any], count: int) -> Tensor:
    kept: list[Tensor] = []

    def reply(hidden: Tensor) -> Tensor:
        kept.append(hidden[0, -count:].float())
        return hidden[:, :1]

    with torch.no_grad():
        tap.run(model, inputs, reply)
    return kept[0]


def probe_packing(tap: HeadTap, model: Any, inputs: Inputs, dtype: torch.dtype) -> None:
    """Raise SetupError where a packed sequence sees the one before it."""
    first, second = (5, 3, 9, 4, 8, 6, 7), (2, 9, 3, 7, 5)
    packed = _last_hidden(tap, model, inputs([first, second]), len(second))
    alone = _last_hidden(tap, model, inputs([second]), len(second))
    difference = float((packed - alone).norm() / alone.norm().clamp(min=1e-12))
    if difference > _LEAK.get(dtype, _LEAK_HALF):
        raise SetupError(
            "in this model a packed conversation sees the one before it: its hidden states differ by "
            f"{difference:.2g} (relative) from those of the same conversation alone",
            remedy="use a model whose layers are all attention, with another --attn_implementation",
        )


def probe_model(
    tap: HeadTap, model: Any, config: Any, *, attention: str, device: torch.device, dtype: torch.dtype
) -> LogitTransform:
    """Both questions, in evaluation mode. `model` as it is trained, wrapped; `dtype`: what it computes in."""

    def inputs(sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        ids = np.concatenate([np.asarray(sequence) for sequence in sequences])
        made = sequence_inputs([len(sequence) for sequence in sequences], ids, attention)
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}

    training = model.training
    model.eval()
    probe_packing(tap, model, inputs, dtype)
    found = probe_logits(tap, model, config, inputs)
    model.train(training)
    return found
