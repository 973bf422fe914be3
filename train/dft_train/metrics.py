"""Sums that stay exact over tokens, accumulation, ranks and steps; and the numbers that are logged from them.

`StepSums` gathers a rank's training steps on the device, without waiting for it, and is reduced once per log
line. `SourceSums` does the same for an evaluation, by source. Used by `loop`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dft_train.loss import LossStats, TokenStats

FIELDS = ("loss", "ce_loss", "avg_p_correct", "token_accuracy", "live")
"""What is summed, in the order of LossStats and TokenStats; the first four are logged, divided by the last."""

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks."""


def _float64(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def ratios(sums: Sequence[float]) -> dict[str, float]:
    """Name -> sum over live tokens / number of live tokens; all 0 where there were none."""
    *totals, live = sums
    return {name: total / live if live else 0.0 for name, total in zip(FIELDS[:-1], totals, strict=True)}


class StepSums:
    """Sums since the last log line."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(FIELDS), dtype=_float64(device), device=device)

    def add(self, stats: LossStats) -> None:
        self._sums += torch.stack(stats[: len(FIELDS)]).to(self._sums)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def add_sums(self, sums: Sequence[float]) -> None:
        """Sums of all ranks, as a checkpoint kept them; to be called on one rank."""
        self._sums += torch.tensor(sums, dtype=self._sums.dtype, device=self._sums.device)

    def total(self, reduce: Reduce) -> list[float]:
        """The sums over all ranks: one collective."""
        return reduce(self._sums.clone()).tolist()

    def clear(self) -> None:
        self._sums.zero_()


class SourceSums:
    """Sums of an evaluation, a row a source."""

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = tuple(sources)
        self._sums = torch.zeros((len(self.sources), len(FIELDS)), dtype=_float64(device), device=device)

    def add(self, tokens: TokenStats, source_ids: Tensor) -> None:
        """`source_ids` [tokens]: the source of each label's token."""
        self._sums.index_add_(0, source_ids, torch.stack(tuple(tokens), dim=1).to(self._sums.dtype))

    def metrics(self, reduce: Reduce) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """(the numbers over every live token, the same by source; sources without live tokens left out)."""
        total = reduce(self._sums.clone())
        by_source = {name: ratios(row) for name, row in zip(self.sources, total.tolist(), strict=True) if row[-1] > 0}
        return ratios(total.sum(dim=0).tolist()), by_source


class Clock:
    """Seconds spent training since the last mark; evaluation and saving pause it."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._pauses = 0.0

    def add_pause(self, seconds: float) -> None:
        self._pauses += seconds

    def mark(self) -> float:
        now = time.monotonic()
        seconds = now - self._since - self._pauses
        self._since, self._pauses = now, 0.0
        return max(seconds, 1e-9)
