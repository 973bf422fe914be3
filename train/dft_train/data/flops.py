"""How much arithmetic a pack costs a model, in floating point operations (FLOPs) of one forward and backward pass.

Counted is what the mathematics needs: every weight that takes part in a product, the head for live labels only, and
attention for the pairs of tokens that see each other within their slice. What is computed twice (gradient
checkpointing) or in vain (sdpa's masked pairs) does not count. `loop` deals packs to ranks by this number and logs
model FLOPs utilization (mfu) from it; a multiplication with its addition is two operations.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

FORWARD, BACKWARD_INPUTS, BACKWARD_WEIGHTS = 2, 2, 2
"""FLOPs of one weight for one token: its own product, the gradient by its input, the gradient by itself."""

PEAK_TFLOPS = (
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("B200", 2250.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("GB300", 2500.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("MI325X", 1307.0),
    ("MI300X", 1307.0),
    ("MI250X", 191.5),
)
"""Words of a device's name -> its peak of dense bfloat16 products, in 10^12 FLOPs a second, from the makers' data
sheets (MI250X: of one of its two dies, which is a device of its own). The first that the name holds counts."""

_NO_PAIRS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")
"""Types of layer (`layer_types` of a configuration) without attention over pairs of tokens."""


class Slices(Protocol):
    """What is asked of a split: `dataset.PackedSplit`. Arrays are [packs] int64."""

    tokens: np.ndarray
    lives: np.ndarray

    def pairs(self, window: int | None) -> np.ndarray: ...


class ModelWork(NamedTuple):
    """FLOPs of a forward and backward pass."""

    per_token: int
    """Of all weights but the head's."""
    per_live: int
    """Of the head, for each live label."""
    per_pair: Mapping[int | None, int]
    """Sliding window in tokens (None: none) -> FLOPs of a pair of tokens that see each other, in all layers with it."""


def attended_pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """[slices] int64: pairs (query, key) of causal attention in slices of `lengths` tokens; a token sees itself and at
    most `window` tokens in all."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return seen * (seen + 1) // 2 + (lengths - seen) * seen


def _per_weight(parameter: nn.Parameter) -> int:
    return FORWARD + BACKWARD_INPUTS + (BACKWARD_WEIGHTS if parameter.requires_grad else 0)


def _elements(parameter: nn.Parameter) -> int:
    """Also where ZeRO-3 holds the parameter in parts."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _share_of_experts(config: Any) -> tuple[int, int]:
    """(experts that a token passes, experts there are) of a mixture-of-experts layer."""
    used = _first(config, "num_experts_per_tok", "moe_topk", "num_experts_per_token")
    there = _first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return (used, there) if used and there else (1, 1)


def _windows(config: Any) -> list[int | None]:
    """The window of every layer that attends to pairs."""
    window = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types is None:
        slides = getattr(config, "use_sliding_window", True)
        return [window if slides else None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types if kind not in _NO_PAIRS]


def _per_pair(config: Any) -> int:
    """Of one layer: scores and weighted values forward, and twice as much backward."""
    head = _first(config, "head_dim") or config.hidden_size // config.num_attention_heads
    scored = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    widths = (scored or head) + (_first(config, "v_head_dim") or head)
    return 3 * 2 * config.num_attention_heads * widths


def model_work(model: nn.Module, config: Any, head: nn.Module) -> ModelWork:
    """What `model` with the output `head` computes. A parameter of two or more dimensions outside of an embedding
    takes part in a product for every token; of experts, only the share that a token passes."""
    config = config.get_text_config()
    used, there = _share_of_experts(config)
    head_weight = getattr(head, "weight")  # noqa: B009
    per_token = 0
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is head_weight or _dimensions(parameter) < 2:
                continue
            cost = _per_weight(parameter) * _elements(parameter)
            per_token += cost * used // there if ".experts." in f".{module_name}.{name}" else cost
    windows = Counter(_windows(config))
    return ModelWork(
        per_token=per_token,
        per_live=_per_weight(head_weight) * _elements(head_weight),
        per_pair={window: layers * _per_pair(config) for window, layers in windows.items()},
    )


def pack_flops(split: Slices, work: ModelWork) -> np.ndarray:
    """[packs] float64: FLOPs of each pack, forward and backward.

    Made of elementwise products and sums alone, so that every rank gets the same bits on whatever CPU.
    """
    flops = split.tokens * float(work.per_token) + split.lives * float(work.per_live)
    for window, per_pair in work.per_pair.items():
        flops = flops + split.pairs(window) * float(per_pair)
    return flops


def peak_flops(device: torch.device, tflops: float | None) -> float | None:
    """FLOPs a second that `device` could do: `tflops` where given, else by the device's name; None where unknown."""
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for words, peak in PEAK_TFLOPS if re.search(rf"\b{words}\b", name)), None)
