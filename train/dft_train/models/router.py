"""The auxiliary loss of mixture-of-experts models, which keeps their router from sending every token to a few experts.

The loss runs in the head (`head`), so the model is called without labels and would leave this one out. It is made
here of the router's logits, by the formula that transformers uses for every such model (Switch Transformer, arXiv
2101.03961, equations 4 to 6), for N experts of which each token takes k:

    aux_loss = N * sum over experts of (choices of the expert / rows) * (mean probability of the expert)

over all layers together. It is not linear in the rows, so it would depend on which packs share a micro-batch; it is
therefore taken pack by pack, each weighed by its part of the optimizer step's tokens. So ranks, accumulation and
micro-batches change nothing here either. Called by `loop`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dft_common.errors import SetupError
from dft_common.logs import get_logger

ASK = "output_router_logits"
"""The argument that makes a model of transformers return its `router_logits`."""


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """0-dim float32, `top_k` where the router is even; `router_logits`: of each layer, [tokens, experts]."""
    experts = router_logits[0].shape[-1]
    choices = probabilities = router_logits[0].new_zeros(experts, dtype=torch.float32)
    rows = 0
    for logits in router_logits:
        found = torch.softmax(logits.float(), dim=-1)
        chosen = torch.topk(found.detach(), top_k, dim=-1).indices.reshape(-1)
        choices = choices.index_add(0, chosen, torch.ones_like(chosen, dtype=torch.float32))
        probabilities = probabilities + found.sum(dim=0)
        rows += len(found)
    return experts * torch.sum(choices / rows * probabilities / rows)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterLoss:
    """What the router's loss counts, and how many experts each token takes."""

    coefficient: float
    top_k: int

    def __call__(self, router_logits: Sequence[Tensor], pack_tokens: Sequence[int], step_tokens: int) -> Tensor:
        """This micro-batch's part of the step's auxiliary loss, before the coefficient: 0-dim float32.

        `router_logits`: [tokens, experts] of each layer with experts. `pack_tokens`: of each pack in the micro-batch;
        none for the dummy sequence, whose loss is a connected zero. `step_tokens`: of the whole optimizer step.
        """
        layers = [logits.reshape(-1, logits.shape[-1]) for logits in router_logits]
        if not pack_tokens:
            return layers[0].float().sum() * 0.0
        packs = zip(*(layer.split(list(pack_tokens)) for layer in layers), strict=True)
        shares = [tokens / step_tokens for tokens in pack_tokens]
        losses = [balance_loss(pack, self.top_k) * share for pack, share in zip(packs, shares, strict=True)]
        return torch.stack(losses).sum()


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def router_loss(model: Any, wanted: float | None, *, reentrant: bool = False) -> RouterLoss | None:
    """The auxiliary loss of `model`: with the coefficient `wanted`, None for that of its configuration.

    None where the coefficient is 0 or the model has no such loss. Raises SetupError where one is wanted all the same,
    and with `reentrant` gradient checkpointing, which records the router's logits without their graph.
    """
    config = model.config.get_text_config()
    top_k = _first(model, "num_experts_per_tok") or _first(config, "num_experts_per_tok", "num_experts_per_token")
    offered = ASK in inspect.signature(type(model).forward).parameters
    if not offered or top_k is None:
        if wanted:
            raise SetupError(
                f"--router_aux_loss_coef {wanted}: {type(model).__name__} has no auxiliary loss in transformers",
                remedy="leave --router_aux_loss_coef out",
            )
        return None
    found = _first(config, "router_aux_loss_coef", "aux_loss_coef") if wanted is None else wanted
    if not found:
        return None
    if reentrant:
        raise SetupError(
            "use_reentrant: true: this kind of gradient checkpointing gives the auxiliary loss of a mixture of experts "
            "no gradient",
            remedy="leave use_reentrant out (it is false by default), or the loss: `--router_aux_loss_coef 0`",
        )
    get_logger().info(
        "mixture of experts: its auxiliary loss counts %g (--router_aux_loss_coef 0 leaves it out)", found
    )
    return RouterLoss(coefficient=float(found), top_k=int(top_k))
