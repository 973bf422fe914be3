"""Sums that stay exact over tokens, accumulation, ranks and steps; and the numbers that are logged from them.

`StepSums` gathers a rank's training steps on the device, without waiting for it, and is reduced once per log
line. `SourceSums` does the same for an evaluation, by source. `Speed` knows from the pack index what the steps
were worth, `Clock` how long they took. Used by `loop`.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dft_train.data.dataset import sum_before
from dft_train.data.sampler import StepSampler
from dft_train.loss import LossStats, TokenStats

FIELDS = {
    "loss": "loss_sum",
    "ce_loss": "ce_sum",
    "avg_p_correct": "p_correct_sum",
    "token_accuracy": "correct",
    "effective_weight": "weight_sum",
    "entropy": "entropy_sum",
}
"""Name in the log, divided by the live tokens -> field of LossStats."""

BINS = tuple(f"p_correct_{10 * number:02}" for number in range(10))
"""The share of live tokens whose p_correct is in [0, 0.1), ... [0.9, 1]: LossStats.p_histogram."""

TOKEN_FIELDS = {"loss": "loss", "ce_loss": "ce", "avg_p_correct": "p_correct", "token_accuracy": "correct"}
"""The same for a source of an evaluation -> field of TokenStats."""

MEASURED = ("tokens_per_second", "mfu", "data_wait", "peak_memory_gib")
"""Logged numbers that are measured: two runs of the same steps differ in them, and in no others."""

GIB = 1 << 30

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks."""


def _float64(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _ratios(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    *totals, live = sums
    return {name: total / live if live else 0.0 for name, total in zip(names, totals, strict=True)}


def ratios(sums: Sequence[float], more: Sequence[str] = ()) -> dict[str, float]:
    """Name -> sum over live tokens / number of live tokens, of what `StepSums` adds up; all 0 where there were none."""
    return _ratios((*FIELDS, *BINS, *more), sums)


class StepSums:
    """Sums since the last log line: one for each of FIELDS and BINS, `more` that come with them, the live tokens."""

    def __init__(self, device: torch.device, more: int = 0) -> None:
        self._sums = torch.zeros(len(FIELDS) + len(BINS) + more + 1, dtype=_float64(device), device=device)

    def add(self, stats: LossStats) -> None:
        self._sums += self._row(stats)

    def add_if_finite(self, stats: LossStats, *more: Tensor) -> None:
        """A micro-batch whose loss is not finite ends the run, or its step is left out: so are its tokens."""
        row = self._row(stats, *more)
        self._sums += torch.where(torch.isfinite(row).all(), row, 0.0)

    def _row(self, stats: LossStats, *more: Tensor) -> Tensor:
        parts = [getattr(stats, field) for field in (*FIELDS.values(), "p_histogram")]
        return torch.cat([part.reshape(-1) for part in (*parts, *more, stats.live)]).to(self._sums)

    def add_sums(self, sums: Sequence[float]) -> None:
        """Sums of all ranks, as a checkpoint kept them; to be called on one rank. `more` of them may be others: a run
        may go on with an auxiliary loss that it did not have, or without it."""
        *kept, live = sums
        places = len(self._sums) - 1
        kept = [*kept, *[0.0] * places][:places]
        self._sums += torch.tensor([*kept, live], dtype=self._sums.dtype, device=self._sums.device)

    def total(self, reduce: Reduce) -> list[float]:
        """The sums over all ranks: one collective."""
        return reduce(self._sums.clone()).tolist()

    def total_and_worst(
        self, measured: Sequence[float], reduce: Reduce, *, rank: int, world_size: int
    ) -> tuple[list[float], list[float]]:
        """(the sums over all ranks, each of `measured` as the rank has it that has the most): one collective, in which
        every rank has places of its own."""
        places = self._sums.new_zeros((world_size, len(measured)))
        places[rank] = torch.tensor(measured, dtype=places.dtype, device=places.device)
        reduced = reduce(torch.cat((self._sums, places.reshape(-1))))
        sums, by_rank = reduced.split((len(self._sums), places.numel()))
        worst = by_rank.reshape(places.shape).amax(dim=0)
        found = torch.cat((sums, worst)).tolist()
        return found[: len(sums)], found[len(sums) :]

    def clear(self) -> None:
        self._sums.zero_()


class SourceSums:
    """Sums of an evaluation: of everything as in training, and a row a source."""

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = tuple(sources)
        self._all = StepSums(device)
        shape = (len(self.sources), len(TOKEN_FIELDS) + 1)
        self._by_source = torch.zeros(shape, dtype=_float64(device), device=device)

    def add(self, stats: LossStats, source_ids: Tensor) -> None:
        """`source_ids` [tokens]: the source of each label's token. `stats` has `tokens`."""
        assert isinstance(stats.tokens, TokenStats)
        self._all.add(stats)
        columns = [getattr(stats.tokens, field) for field in (*TOKEN_FIELDS.values(), "live")]
        self._by_source.index_add_(0, source_ids, torch.stack(columns, dim=1).to(self._by_source.dtype))

    def metrics(self, reduce: Reduce) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """(the numbers over every live token, the main ones by source; sources without live tokens left out)."""
        rows = reduce(self._by_source.clone()).tolist()
        by_source = {
            name: _ratios(tuple(TOKEN_FIELDS), row) for name, row in zip(self.sources, rows, strict=True) if row[-1] > 0
        }
        return ratios(self._all.total(reduce)), by_source


class Speed:
    """What the steps since the last log line were worth, by the pack index alone: no rank asks another."""

    def __init__(self, sampler: StepSampler, tokens: np.ndarray, flops: np.ndarray, peak: float | None) -> None:
        """`tokens`, `flops` [packs]: of each pack. `peak`: FLOPs a second of all devices together, if known."""
        self._sampler = sampler
        self._worth = (tokens, flops)
        self._peak = peak
        self._logged = (0.0, 0.0)

    def start(self, step: int) -> None:
        """Count from `step` on."""
        self._logged = self._seen(step)

    def flops(self, step: int) -> float:
        """FLOPs of optimizer steps [0, step), all ranks together."""
        return self._seen(step)[1]

    def _seen(self, step: int) -> tuple[float, float]:
        tokens, flops = self._worth
        return sum_before(tokens, self._sampler, step), sum_before(flops, self._sampler, step)

    def metrics(self, step: int, seconds: float) -> dict[str, float]:
        """Of the steps since the last call, which took `seconds`."""
        seen = self._seen(step)
        tokens, flops = (now - before for now, before in zip(seen, self._logged, strict=True))
        self._logged = seen
        metrics = {"tokens_seen": int(seen[0]), "tokens_per_second": tokens / seconds}
        return metrics if self._peak is None else {**metrics, "mfu": flops / seconds / self._peak}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held so far: tensors on its CUDA device, or all of it without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024) / GIB


def evaluation_names(
    prefix: str, overall: Mapping[str, float], by_source: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, str]]:
    """(the numbers of an evaluation by the names they have in log_history, those of sources -> their trackers' names).

    `PREFIX_NAME` and `PREFIX_<source>_NAME`; `PREFIX_<source>/NAME`, as in trackers, where that is taken: a source
    called `ce` has a loss too.
    """
    metrics = {f"{prefix}_{name}": value for name, value in overall.items()}
    tracked = {}
    for source, numbers in by_source.items():
        for name, value in numbers.items():
            key, folder = f"{prefix}_{source}_{name}", f"{prefix}_{source}/{name}"
            key = folder if key in metrics else key
            metrics[key], tracked[key] = value, folder
    return metrics, tracked


class Clock:
    """Seconds spent training since the last mark, from the first `waiting` on; evaluation and saving pause it."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._pauses = 0.0
        self.waited = 0.0
        """Seconds of these in which nothing could be computed for want of data."""

    def add_pause(self, seconds: float) -> None:
        if self._since is not None:
            self._pauses += seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the reading of a step's batches."""
        start = time.monotonic()
        if self._since is None:
            self._since = start
        yield
        self.waited += time.monotonic() - start

    def mark(self) -> float:
        assert self._since is not None
        now = time.monotonic()
        seconds = now - self._since - self._pauses
        self._since, self._pauses, self.waited = now, 0.0, 0.0
        return max(seconds, 1e-9)
