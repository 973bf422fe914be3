"""`metrics.jsonl` in the run's directory: a line for every log entry, whatever the trackers.

A callback of the trainer on rank 0, made in `loop`.

The lines are those of `log_history` in trainer_state.json, with the time of day: `step`, `epoch`, `time` (seconds since
1970) and the numbers by their plain names. A resumed run goes on behind the entries of its checkpoint: lines that were
written after it are cut, so that the file is the uninterrupted run's but for `time` and `metrics.MEASURED`.
JSON has no NaN and no infinity: they are the strings "NaN", "Infinity" and "-Infinity", which Python's float() reads.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dft_common.manifest import write_atomically
from dft_train.ranks import launch

JOURNAL_NAME = "metrics.jsonl"


def _plain(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def encode_line(entry: Mapping[str, Any], moment: float | None) -> bytes:
    """One entry of the log history as a line of JSON; without `time` where the moment is not known."""
    stamp = {} if moment is None else {"time": round(moment, 3)}
    first = {name: entry[name] for name in ("step", "epoch") if name in entry}
    fields = {**first, **stamp, **entry}
    return (
        json.dumps({name: _plain(value) for name, value in fields.items()}, allow_nan=False, default=str).encode()
        + b"\n"
    )


def _step(line: bytes) -> Any:
    """The step of a line; None of one that was not written to its end."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None


class Journal(TrainerCallback):
    """Writes the file. A disk that is full costs lines, with one warning, and not the run."""

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / JOURNAL_NAME
        self._open = False
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._open = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._go_back(state.log_history)
        except OSError as error:
            self._warn(error)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._open:
            self._add(state.log_history[-1])

    def _go_back(self, history: Sequence[Mapping[str, Any]]) -> None:
        """To the entries that the run goes on from. A fresh start keeps an older file as metrics.jsonl.old."""
        there = self._path.exists()
        if not history:
            if there:
                self._path.replace(self._path.with_name(f"{JOURNAL_NAME}.old"))
            return
        lines = self._path.read_bytes().splitlines(keepends=True) if there else []
        lines += [b""] * (len(history) - len(lines))
        kept = [
            line if line.endswith(b"\n") and _step(line) == entry.get("step") else encode_line(entry, None)
            for line, entry in zip(lines, history, strict=False)
        ]
        write_atomically(self._path, b"".join(kept))

    def _add(self, entry: Mapping[str, Any]) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                before, line = file.tell(), encode_line(entry, time.time())
                if file.write(line) < len(line):
                    # The next line would otherwise be written behind half of this one.
                    file.truncate(before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            launch.warn("%s: lines are missing from now on: %s", self._path, error)
        self._warned = True
