"""What a run is going to do, in numbers: the plan line of every run, and `--dry_run`. Called by `trainer`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from dft_common.logs import get_logger
from dft_train.dataset import PackedSplit
from dft_train.deepspeed_config import zero_stage
from dft_train.model import count_parameters
from dft_train.sampler import Layout

GIB = 1 << 30


class Memory(NamedTuple):
    """Bytes on one device, activations and buffers left out."""

    parameters: float
    gradients: float
    optimizer: float


def total_steps(packs: int, layout: Layout, args: TrainingArguments) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the run)."""
    per_epoch = -(-packs // layout.global_batch)
    return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def describe(train: PackedSplit, evaluation: PackedSplit | None, layout: Layout, args: TrainingArguments) -> str:
    """The plan as one line."""
    info = train.info
    per_epoch, steps = total_steps(len(train), layout, args)
    checked = f"{len(evaluation):,} packs" if evaluation is not None else "nothing"
    batch = f"{layout.per_device} a device x {layout.accumulation} accumulated x {layout.world_size} ranks"
    return (
        f"{len(train.reader):,} rows in {info.packs:,} packs of up to {info.max_length:,} tokens ({info.tokens:,} "
        f"tokens, {info.live:,} trained); "
        f"{layout.global_batch:,} packs a step ({batch}); {per_epoch:,} steps an epoch, "
        f"{steps:,} in all; evaluates {checked}"
    )


def estimate_memory(parameters: int, *, stage: int, half: bool, offload: bool, world_size: int) -> Memory:
    """AdamW: two moments in float32, and with 16-bit weights under DeepSpeed a float32 copy of them too.

    ZeRO-1 parts the optimizer's states over the ranks, 2 the gradients too, 3 the parameters too.
    """
    bytes_each = 2 if half else 4
    states = 12 if half else 8
    return Memory(
        parameters=parameters * bytes_each / (world_size if stage >= 3 else 1),
        gradients=parameters * bytes_each / (world_size if stage >= 2 else 1),
        optimizer=0.0 if offload else parameters * states / (world_size if stage >= 1 else 1),
    )


def parameters_of(config: Any, trust_remote_code: bool) -> int:
    """Parameters of a model of this configuration; no weights are made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return count_parameters(model)


def report_memory(parameters: int, args: TrainingArguments) -> None:
    """Log the estimate of memory on each device."""
    plugin = args.deepspeed_plugin
    config = plugin.deepspeed_config if plugin is not None else None
    zero = (config or {}).get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    half = bool(args.deepspeed) and (args.bf16 or args.fp16)
    stage = zero_stage(config)
    memory = estimate_memory(parameters, stage=stage, half=half, offload=offload, world_size=args.world_size)
    how = f"ZeRO-{stage}" if stage else "no ZeRO"
    get_logger().info(
        "memory for each of %s devices (%s, AdamW): parameters %.3f GiB, gradients %.3f GiB, optimizer %.3f GiB%s; "
        "activations come on top",
        args.world_size,
        how,
        *(value / GIB for value in memory),
        " (offloaded to the CPU)" if offload else "",
    )
    get_logger().info("model: %s parameters", f"{parameters:,}")
