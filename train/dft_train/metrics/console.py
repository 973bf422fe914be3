"""One line for each thing that happens in a run, on rank 0. A callback of the trainer, made in `loop`."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dft_common.logs import get_logger

_TRAIN = (
    ("loss", "loss", ".4f"),
    ("ce_loss", "ce", ".4f"),
    ("avg_p_correct", "p", ".4f"),
    ("token_accuracy", "accuracy", ".4f"),
    ("grad_norm", "grad_norm", ".3g"),
    ("learning_rate", "lr", ".3g"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("mfu", "mfu", ".1%"),
)
_EVAL = _TRAIN[:4]
SLOW_DATA = 0.1
"""Share of the time: a device that waits longer for data is worth a word."""


def _line(logs: dict[str, Any], columns: tuple[tuple[str, str, str], ...], prefix: str = "") -> str:
    shown = ((title, logs.get(prefix + name), form) for name, title, form in columns)
    return "  ".join(f"{title} {format(value, form)}" for title, value, form in shown if isinstance(value, int | float))


class ConsoleLines(TrainerCallback):
    """Log, evaluation and checkpoint lines."""

    def __init__(self) -> None:
        self._data_lines = 0

    def _say_once_that_data_is_slow(self, share: float, workers: int) -> None:
        """Not of the first line, which has the start in it."""
        self._data_lines += 1
        if self._data_lines == 2 and share > SLOW_DATA:
            get_logger().warning(
                "%.0f %% of the time went into waiting for data: try --dataloader_num_workers %d, or a faster disk",
                100 * share,
                2 * workers or 2,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        logger = get_logger()
        if "eval_loss" in logs:
            at = f"step {state.global_step}: " if state.global_step else ""
            logger.info("evaluation  %s%s", at, _line(logs, _EVAL, "eval_"))
        elif "train_runtime" in logs:
            logger.info("trained %s steps in %.1f s", f"{state.global_step:,}", logs["train_runtime"])
        elif "loss" in logs:
            logger.info("step %s/%s  %s", f"{state.global_step:,}", f"{state.max_steps:,}", _line(logs, _TRAIN))
            self._say_once_that_data_is_slow(logs.get("data_wait", 0.0), args.dataloader_num_workers)
            if not math.isfinite(logs["loss"]):
                logger.warning("the loss is not finite at step %s: lower --learning_rate", state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        get_logger().info("saved %s/checkpoint-%s", args.output_dir, state.global_step)
