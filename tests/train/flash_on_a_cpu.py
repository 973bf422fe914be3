"""flash-attn's two functions in plain torch, so that a CPU takes the way through transformers that a GPU takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool, window: tuple[int, int]
) -> Tensor:
    """[tokens, heads, head size] of one sequence."""
    assert causal
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    at, seen = torch.arange(len(query))[:, None], torch.arange(len(key))[None]
    visible = seen <= at
    if window[0] >= 0:
        visible &= seen >= at - window[0]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
) -> Tensor:
    return torch.stack([_attend(*one, softmax_scale, causal, window_size) for one in zip(q, k, v, strict=True)])


class Varlen:
    """flash_attn_varlen_func, which also notes the borders that it was told."""

    def __init__(self) -> None:
        self.borders: set[tuple[int, ...]] = set()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1),
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        assert sum(lengths) == len(q) and max_seqlen_q == max_seqlen_k == max(lengths)
        self.borders.add(tuple(cu_seqlens_q.tolist()))
        parts = zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
        return torch.cat([_attend(*part, softmax_scale, causal, window_size) for part in parts])


def install(monkeypatch: Any) -> Varlen:
    """Let transformers find these in flash-attn's place."""
    varlen, utils = Varlen(), modeling_flash_attention_utils
    found = (flash_attn_func, varlen, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: found)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **kwargs: True)
    return varlen
