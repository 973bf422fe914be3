"""Packed conversations in models that carry a state along: linear attention, state spaces, short convolutions.

Attention keeps the conversations of a pack apart by a mask; a recurrent layer (Mamba, gated delta net, LFM2's
convolution) would carry its state from one into the next. Here each such layer is run on one conversation at a time,
from an empty state, and the outputs are joined: exact with every kernel, at the price of smaller calls. Called by
`load` when it has loaded one; `probe` checks the outcome, so a layer that is not found here is refused there.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dft_common.logs import get_logger

_OF_THE_WHOLE_PACK = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that tell a layer the borders in a pack: no longer true of one conversation."""


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that hold a convolution over time: in transformers, each recurrence has one in front of it."""
    return [module for module in model.modules() if any(isinstance(part, nn.Conv1d) for part in module.children())]


def _piece(value: Any, start: int, end: int, tokens: int) -> Any:
    """`value`, or tokens [start, end) of it where its second dimension runs over the pack's tokens."""
    if isinstance(value, tuple):
        return tuple(_piece(one, start, end, tokens) for one in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == tokens:
        return value[:, start:end]
    return value


class StateReset:
    """Makes the `layers` of `model` begin anew at each conversation of a pack, in training and evaluation.

    The borders are where position_ids are 0. Without position_ids, as in generation, the layers are what they were.
    """

    def __init__(self, model: Any, layers: list[nn.Module]) -> None:
        self._ends: list[int] = []
        """Of the conversations in the pack that is being computed; kept for a backward pass that computes it again."""
        # On the instances, as `head` does: what is saved of them stays as it is.
        for layer in layers:
            setattr(layer, "forward", functools.partial(self._apart, layer.forward))  # noqa: B010
        forward = model.forward

        @functools.wraps(forward)
        def noting_borders(*args: Any, **kwargs: Any) -> Any:
            self._ends = self._find_ends(kwargs.get("position_ids"))
            return forward(*args, **kwargs)

        model.forward = noting_borders

    @staticmethod
    def _find_ends(position_ids: Tensor | None) -> list[int]:
        if position_ids is None or len(position_ids) != 1:
            return []
        starts = torch.nonzero(position_ids[0] == 0).squeeze(1).tolist()
        return [*starts[1:], position_ids.shape[1]]

    def _apart(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._ends:
            return forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_THE_WHOLE_PACK}
        tokens = self._ends[-1]
        outputs = []
        for start, end in zip([0, *self._ends], self._ends, strict=False):
            own = {name: _piece(value, start, end, tokens) for name, value in kwargs.items()}
            outputs.append(forward(*_piece(args, start, end, tokens), **own))
        if isinstance(outputs[0], tuple):
            return (torch.cat([first for first, *_ in outputs], dim=1), *outputs[-1][1:])
        return torch.cat(outputs, dim=1)


def _gather_once(layer: nn.Module) -> None:
    """Let ZeRO-3 gather the parameters of `layer` once for all conversations.

    Gathered part by part, ranks with more conversations in their pack would gather more often than the others, and
    all would wait for ever. DeepSpeed lets go of them in the backward pass once it has the gradient of a positional
    argument, so there has to be one: without, it would be at once.
    """
    from deepspeed.utils import set_z3_leaf_module

    first = next(iter(inspect.signature(layer.forward).parameters))

    def positional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rest = {name: value for name, value in kwargs.items() if name != first}
        return (args, kwargs) if args else ((kwargs[first],), rest)

    set_z3_leaf_module(layer, True)
    # Before DeepSpeed's own hooks, as it was there first.
    layer.register_forward_pre_hook(positional, with_kwargs=True)


def reset_states(model: Any) -> None:
    """Let the recurrent layers of `model`, where it has some, begin anew at each conversation of a pack."""
    layers = recurrent_layers(model)
    if not layers:
        return
    if is_deepspeed_zero3_enabled():
        for layer in layers:
            _gather_once(layer)
    names = ", ".join(sorted({type(layer).__name__ for layer in layers}))
    get_logger().info(
        "%d layers carry a state along (%s): packed conversations pass them one by one", len(layers), names
    )
    StateReset(model, layers)
