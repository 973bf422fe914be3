"""The layouts that `verify` compares, and the processes that run them.

On a CPU ranks are forked from a process that has imported everything, and start at once. With an accelerator each is
a new process: a GPU cannot be used on both sides of a fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dft_train.ranks import launch
from dft_train.settings.deepspeed_config import read_deepspeed
from dft_train.verify.excerpt import GLOBAL_BATCH
from dft_train.verify.rank import run_rank

TIME_LIMIT = 1800.0
"""Seconds for one layout."""


class Layout(NamedTuple):
    """One way to compute the same two steps."""

    name: str
    ranks: int
    per_device: int
    deepspeed: str | None = None
    """A configuration as JSON."""
    fused: str = "auto"

    def words(self) -> list[str]:
        """Its part of the command line."""
        words = ["--per_device_train_batch_size", str(self.per_device), "--fused_loss", self.fused]
        words += ["--gradient_accumulation_steps", str(GLOBAL_BATCH // self.ranks // self.per_device)]
        return words + (["--deepspeed", self.deepspeed] if self.deepspeed else [])


class Outcome(NamedTuple):
    """How a layout's run ended."""

    layout: Layout
    directory: Path
    exit_code: int
    message: str
    """Its last lines where it failed."""


_AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def _zero(stage: int, bf16: bool, **more: Any) -> str:
    """A configuration that parts even the smallest parameters. Any optimizer may be offloaded, none is compiled."""
    section = {"stage": stage, "reduce_bucket_size": 1_000_000, **more}
    if stage == 3:
        section["stage3_param_persistence_threshold"] = 0
    top = {**dict.fromkeys(_AUTO, "auto"), "bf16": {"enabled": bf16}, "zero_force_ds_cpu_optimizer": False}
    return json.dumps({**top, "zero_optimization": section})


def _with_precision(path: str, bf16: bool) -> str:
    config = {**read_deepspeed(path), **dict.fromkeys(_AUTO, "auto"), "bf16": {"enabled": bf16}}
    return json.dumps({"zero_force_ds_cpu_optimizer": False, **config, "fp16": {"enabled": False}})


def layouts(ranks: int, *, bf16: bool, deepspeed: str | None, has_deepspeed: bool) -> list[Layout]:
    """What is compared; the first is the reference. ranks: how many there can be, a divisor of GLOBAL_BATCH."""
    each = GLOBAL_BATCH // ranks
    chosen = [
        Layout("1 rank, batch 4", 1, 4),
        Layout("1 rank, batch 4, dense loss", 1, 4, fused="off"),
        Layout("1 rank x 4 accumulated", 1, 1),
        Layout("1 rank, batch 2 x 2 accumulated", 1, 2),
    ]
    if ranks > 1:
        chosen.append(Layout(f"{ranks} ranks x {each} accumulated", ranks, 1))
    if has_deepspeed:
        away = {"offload_optimizer": {"device": "cpu"}}
        chosen += [
            Layout(f"ZeRO-2, {ranks} ranks", ranks, 1, _zero(2, bf16)),
            Layout(f"ZeRO-3, {ranks} ranks", ranks, 1, _zero(3, bf16)),
            Layout(
                f"ZeRO-3 with offload, {ranks} ranks",
                ranks,
                1,
                _zero(3, bf16, **away, offload_param=away["offload_optimizer"]),
            ),
        ]
    if deepspeed:
        chosen.append(Layout(f"{Path(deepspeed).name}, {ranks} ranks", ranks, 1, _with_precision(deepspeed, bf16)))
    return chosen


def _environment(layout: Layout, rank: int, port: int) -> dict[str, str]:
    if layout.ranks == 1:
        return {}
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": layout.ranks, "LOCAL_WORLD_SIZE": layout.ranks}
    return {name: str(value) for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


def _forked(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """In the child: never returns."""
    import torch

    code = 1
    try:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # The parent's streams may be a test's.
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(environment.get("WORLD_SIZE", "1"))))
        code = run_rank(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_all(layout: Layout, arguments: list[str], port: int, outputs: Sequence[Path]) -> list[int]:
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank, output in enumerate(outputs):
        process = context.Process(target=_forked, args=(arguments, _environment(layout, rank, port), output))
        process.start()
        ranks.append(process)
    for process in ranks:
        process.join(TIME_LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in ranks]


def _start_all(layout: Layout, arguments: list[str], port: int, outputs: Sequence[Path]) -> list[int]:
    ranks = []
    for rank, output in enumerate(outputs):
        request = {"environment": _environment(layout, rank, port), "arguments": arguments}
        command = [sys.executable, "-m", "dft_train.verify.rank", json.dumps(request)]
        with output.open("wb") as file:
            ranks.append(subprocess.Popen(command, stdout=file, stderr=file))
    codes = []
    for process in ranks:
        try:
            codes.append(process.wait(TIME_LIMIT))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    return codes


def run_layout(layout: Layout, arguments: Sequence[str], directory: Path) -> Outcome:
    """Run one layout in `directory`, with its own and the common `arguments` of `train`."""
    directory.mkdir(parents=True)
    words = [*arguments, *layout.words(), "--output_dir", str(directory)]
    outputs = [directory / f"rank-{rank}.txt" for rank in range(layout.ranks)]
    start = _start_all if launch.has_accelerator() else _fork_all
    codes = start(layout, words, launch.free_port(), outputs)
    worst = next((at for at, code in enumerate(codes) if code), None)
    if worst is None:
        return Outcome(layout, directory, 0, "")
    text = outputs[worst].read_text(errors="replace") or outputs[0].read_text(errors="replace")
    return Outcome(layout, directory, codes[worst], "\n".join(text.strip().splitlines()[-6:]))
