"""Stands in for the language model head during a forward pass, so that the loss runs where the head's weight is.

The trainer calls `loss` with one batch; `probe` asks the model questions through the same door. Everything goes
through the modules' own forwards: ZeRO-3's hooks gather the head's weight around the head's forward, tied or
not, and what the patched head returns has passed those hooks before it leaves the model. Labels are shifted
here, and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dft_common.errors import SetupError
from dft_common.schema import IGNORE_INDEX
from dft_train.loss import LossStats, linear_dft_loss, logits_dft_loss
from dft_train.models.lora import inner_head
from dft_train.models.router import ASK

Reply = Callable[[Tensor], Tensor]
"""What the head answers: from the last hidden states [1, tokens, hidden_size] to any tensor."""


class LossRequest(NamedTuple):
    """What one batch asks of the loss; shapes as `collate.collate` makes them."""

    labels: Tensor
    loss_weights: Tensor | None
    num_valid_tokens: float
    objective: str
    dft_alpha: float
    softcap: float | None = None
    logit_scale: float | None = None
    objective_options: Mapping[str, float] = MappingProxyType({})
    """Of another objective than dft; those left out are at their defaults."""
    fused: str = "auto"
    per_token: bool = False
    live: Tensor | None = None
    """[live] int64: where the live labels stand, not shifted. None: to be found, which waits for the device."""


def shift(values: Tensor, fill: float) -> Tensor:
    """[1, tokens] -> [tokens]: what belongs to token i + 1 comes to stand at i, `fill` at the end.

    The first token of a slice is never a label (`collate`), so nothing crosses from one slice to the next.
    """
    flat = values.reshape(-1)
    return torch.cat((flat[1:], flat.new_full((1,), fill)))


class HeadTap:
    """Patches `model.forward` and its head's forward; without a reply set, both are what they were."""

    def __init__(self, model: Any) -> None:
        head = inner_head(model.get_output_embeddings())
        if not isinstance(head, nn.Module):
            raise SetupError(
                f"{type(model).__name__} has no output head (get_output_embeddings gives {head})",
                remedy="use a causal language model",
            )
        self.head: Any = head
        self.plain = type(head) is nn.Linear and head.weight.is_floating_point()
        """Whether the head is its weight and bias and nothing else; not so where it is quantized or has adapters."""
        self.logits: Tensor | None = None
        """What the model made of the last reply (its `logits`), detached."""
        self.wants_router = False
        """Whether to ask the model for its `router_logits` where gradients are made."""
        self.router_logits: tuple[Tensor, ...] | None = None
        """Of the last forward, where wanted; with their graph, so whoever takes them puts None here."""
        self._reply: Reply | None = None
        self._out: Tensor | None = None
        self._head_forward = head.forward
        self._model_forward = model.forward
        # On the instances: their classes, their names and what is saved of them stay as they are.
        setattr(head, "forward", self._answer)  # noqa: B010
        # No bound method: accelerate's autocast would bind it anew, to the model.
        model.forward = functools.partial(self._forward)

    def _answer(self, hidden: Tensor) -> Tensor:
        return self._head_forward(hidden) if self._reply is None else self._reply(hidden)

    def own_output(self, hidden: Tensor) -> Tensor:
        """What the head itself makes of `hidden`; for replies."""
        return self._head_forward(hidden)

    def _catch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._out = output

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._reply is None:
            return self._model_forward(*args, **kwargs)
        # Registered now, so that it comes after DeepSpeed's own hooks and sees what they return.
        handle = self.head.register_forward_hook(self._catch)
        more = {ASK: True} if self.wants_router and torch.is_grad_enabled() else {}
        try:
            outputs = self._model_forward(*args, **kwargs, **more, use_cache=False)
        finally:
            handle.remove()
        self.logits = outputs.logits.detach()
        answer = {"head": self._out}
        return {**answer, "router_logits": outputs.router_logits} if more else answer

    def run(self, model: Any, inputs: Mapping[str, Tensor], reply: Reply) -> Tensor:
        """`model(**inputs)`, where `reply` answers for the head. `model` is the model or what wraps it."""
        self._reply = reply
        try:
            answer = model(**inputs)
            self.router_logits = answer.get("router_logits")
            return answer["head"]
        finally:
            self._reply = self._out = None

    def loss(self, model: Any, inputs: Mapping[str, Tensor], request: LossRequest) -> tuple[Tensor, LossStats]:
        """The loss of one batch (0-dim, connected to the model's parameters) and its statistics."""
        stats: list[LossStats] = []

        if request.fused == "on" and not self.plain:
            raise SetupError(
                f"--fused_loss on: the model's head is {type(self.head).__name__}, expected a torch.nn.Linear as it is",
                remedy="use `--fused_loss auto`, which computes all logits with such a head",
            )
        labels = shift(request.labels, IGNORE_INDEX)
        loss_weights = None if request.loss_weights is None else shift(request.loss_weights, 0.0)
        options = {name: getattr(request, name) for name in LossRequest._fields[2:]}
        # A slice's first label is dead, so none comes to stand before the first place.
        options["live"] = None if request.live is None else request.live - 1

        def reply(hidden: Tensor) -> Tensor:
            rows = hidden.reshape(-1, hidden.shape[-1])
            if self.plain:
                weights = {"bias": self.head.bias, "loss_weights": loss_weights}
                loss, found = linear_dft_loss(rows, self.head.weight, labels, **weights, **options)
            else:
                del options["fused"]
                loss, found = logits_dft_loss(self._head_forward(rows), labels, loss_weights=loss_weights, **options)
            stats.append(found)
            # The model does to it what it does to logits (casts, scales); so it has their three dimensions.
            return loss.reshape(1, 1, 1)

        out = self.run(model, inputs, reply)
        if len(stats) != 1:
            raise SetupError(f"{type(model).__name__} ran its head {len(stats)} times in one forward, expected once")
        return out.reshape(()), stats[0]
