"""Steps whose loss stands far above the last hundred: noted, with the rows of the worst pack. Used by `faults`.

The plain cross entropy is watched, whatever the objective: the DFT loss of a token stays small however wrong the
model is about it. Median and median absolute deviation, because a mean and a standard deviation would follow the very
spikes that they are to find.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dft_common import logs
from dft_train.faults.trace import Suspect

NAME = "spikes.jsonl"
WINDOW = 100
MIN_STEPS = 20
"""Under so many steps there is no telling what is usual."""
DEVIATIONS = 8.0
_NORMAL = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution."""
_LEAST_SPREAD = 0.02
"""Relative to the median: where the loss hardly moves, not every flutter is a spike."""
_ROWS_SHOWN = 4


class Spike(NamedTuple):
    step: int
    ce_loss: float
    median: float
    """Of the steps before."""
    deviations: float


class Worst(NamedTuple):
    """The micro-batch of a rank with the highest cross entropy per trained token."""

    ce_loss: float
    rows: list[Suspect]


class Spikes:
    """`add` each step in order; a spike that lasts several steps is told once."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._tokens: deque[float] = deque(maxlen=WINDOW)
        self._in_spike = False

    def add(self, step: int, ce_sum: float, live: float) -> Spike | None:
        """`ce_sum` over the `live` tokens of the whole step; a step without any is passed over."""
        if live <= 0:
            return None
        loss = ce_sum / live
        found = self._judge(step, loss, live)
        self._losses.append(loss)
        self._tokens.append(live)
        begins = found is not None and not self._in_spike
        self._in_spike = found is not None
        return found if begins else None

    def _judge(self, step: int, loss: float, live: float) -> Spike | None:
        if len(self._losses) < MIN_STEPS:
            return None
        median = statistics.median(self._losses)
        spread = _NORMAL * statistics.median(abs(value - median) for value in self._losses)
        spread = max(spread, _LEAST_SPREAD * abs(median))
        # The last step of an epoch may have few tokens: its mean is that much less certain.
        certainty = min(1.0, live / statistics.median(self._tokens)) ** 0.5
        deviations = (loss - median) / spread * certainty if spread else 0.0
        return Spike(step, loss, median, deviations) if deviations > DEVIATIONS else None


def tell(spike: Spike, worst: Sequence[Worst], output_dir: Path) -> None:
    """One warning, and a line of `spikes.jsonl`; `worst` of every rank. On rank 0."""
    of_all = max(worst, key=lambda candidate: candidate.ce_loss)
    rows = [f"row {row.row} ({row.source}, {row.id})" for row in of_all.rows[:_ROWS_SHOWN]]
    more = f" and {len(of_all.rows) - len(rows)} more" if len(of_all.rows) > len(rows) else ""
    logs.get_logger().warning(
        "step %d: the cross entropy jumped to %.4f, %.0f deviations above the median %.4f of the steps before; highest "
        "(%.4f) on %s%s",
        spike.step,
        spike.ce_loss,
        spike.deviations,
        spike.median,
        of_all.ce_loss,
        ", ".join(rows) or "no row",
        more,
    )
    line = {
        **spike._asdict(),
        "worst_ce_loss": of_all.ce_loss,
        "packs": sorted({row.pack for row in of_all.rows}),
        "rows": [{"row": row.row, "source": row.source, "id": row.id} for row in of_all.rows],
    }
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with (output_dir / NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        logs.get_logger().warning("%s: %s", output_dir / NAME, error.strerror)
