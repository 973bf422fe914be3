"""Asks the model itself, before the first batch, what the loss and the packing rely on. Called by `guards`.

1. What happens to the head's output before the softmax: nothing, a factor (Cohere, Granite, Falcon-H1), or a
   soft cap (Gemma). Known numbers go in as the head's output, and what comes out tells.
2. That a packed conversation does not see another one: its last hidden states must not change when the others of
   its pack do, and must be those of the conversation alone. Models that carry a state along fail here.
Forward passes in the run's own precision and parallelism, the same number of them on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dft_common.errors import SetupError
from dft_train.data.collate import sequence_inputs
from dft_train.models.head import HeadTap

_NUMBERS = (-40.0, -3.0, -0.5, 0.25, 1.0, 7.0, 60.0)
_EXACT = 1e-5
"""Relative: the numbers pass in float32."""
_TOLERANCES = {torch.float32: (1e-5, 1e-3)}
_TOLERANCES_HALF = (1e-3, 0.1)
"""Relative norms above which a sequence is taken to see another (`Leak.others`, `Leak.alone`). Measured with eight
layers of random weights, standard deviation 0.02 to 0.2: without a leak 0 and at most 2e-6 (in 16 bits 0 and 0.01);
where positions do not restart 1.0 to 1.5; a short convolution's state 0.005 to 0.34 (in 16 bits from 0.012). With a
single one of them, untrained, it is 1e-4, which 16 bits round away."""

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


class Leak(NamedTuple):
    """How much the last hidden states of packed sequences depend on what else is in the pack: relative norms."""

    others: float
    """Between two packs that differ in the other sequences alone: without a leak nothing differs, not even the
    rounding, for every row goes through the same kernels at the same place. (Experts group their rows by what the
    router chooses, so with them rounding may differ.)"""
    alone: float
    """Between the pack and each sequence alone: other shapes, so other rounding."""


def _last_hidden(tap: HeadTap, model: Any, inputs: dict[str, Any]) -> Tensor:
    """[tokens, hidden_size] float32."""
    kept: list[Tensor] = []

    def reply(hidden: Tensor) -> Tensor:
        kept.append(hidden[0].float())
        return hidden[:, :1]

    with torch.no_grad():
        tap.run(model, inputs, reply)
    return kept[0]


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def _others_changed(sequences: Sequence[Sequence[int]], kept: int, rows: int) -> list[list[int]]:
    """Every sequence but those whose number has the parity `kept` gets other tokens."""
    return [
        list(ids) if at % 2 == kept else [(int(token) + 1) % rows for token in ids] for at, ids in enumerate(sequences)
    ]


def measure_leak(tap: HeadTap, model: Any, inputs: Inputs, sequences: Sequence[Sequence[int]], rows: int) -> Leak:
    """The two differences, the largest over `sequences`. rows: of the embeddings. 3 + len(sequences) forward passes."""
    borders = np.cumsum([0, *map(len, sequences)])
    parts = [slice(*pair) for pair in pairwise(borders)]
    packed = _last_hidden(tap, model, inputs(sequences))
    others, alone = [0.0], [0.0]
    for kept in (0, 1):
        changed = _last_hidden(tap, model, inputs(_others_changed(sequences, kept, rows)))
        others += [_difference(changed[part], packed[part]) for part in parts[kept::2]]
    for sequence, part in zip(sequences, parts, strict=True):
        alone.append(_difference(packed[part], _last_hidden(tap, model, inputs([sequence]))))
    return Leak(max(others), max(alone))


def has_experts(config: Any) -> bool:
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def refuse_leak(leak: Leak, dtype: torch.dtype, *, experts: bool = False) -> None:
    """Raise SetupError where a packed sequence depends on another. A difference that is not a number passes.

    experts: they group tokens, so rounding may differ, and in 16 bits send a token to another one: no leak.
    """
    others, alone = _TOLERANCES.get(dtype, _TOLERANCES_HALF)
    if experts:
        others = 1e-4 if dtype in _TOLERANCES else alone
    said = (
        ("changes by {0:.2g} when the other conversations of its pack change", leak.others, others),
        ("differs by {0:.2g} from that of the same conversation alone", leak.alone, alone),
    )
    for what, found, most in said:
        if found > most:
            raise SetupError(
                f"in this model a packed conversation sees the one before it: its hidden state {what.format(found)} "
                f"(relative; {most:.2g} is allowed in {str(dtype).removeprefix('torch.')})",
                remedy="try another --attn_implementation; or train on one conversation at a time: run "
                "`dft-prep pack OUT --packing False`, then this with `--packing False` and batch sizes of 1",
            )


def probe_packing(tap: HeadTap, model: Any, inputs: Inputs, dtype: torch.dtype) -> None:
    """Raise SetupError where a packed sequence sees another, by a few fixed tokens. `model` in evaluation mode."""
    sequences = ((5, 3, 9, 4, 8, 6, 7), (2, 9, 3, 7, 5))
    refuse_leak(measure_leak(tap, model, inputs, sequences, rows=16), dtype)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def inputs_for(attention: str, device: torch.device) -> Inputs:
    """What makes the model's inputs of sequences."""

    def inputs(sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        ids = np.concatenate([np.asarray(sequence) for sequence in sequences])
        made = sequence_inputs([len(sequence) for sequence in sequences], ids, attention)
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}

    return inputs
