"""What a run is going to do, in numbers: the plan line of every run, and `--dry_run`. Called by `trainer`.

The memory is `memory`'s prediction for the largest micro-batch that the pack index can deal out. `request_for` makes
its question from a run's settings; whoever runs out of memory later may ask it again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from transformers import TrainingArguments

from dft_common.logs import get_logger
from dft_common.manifest import Manifest
from dft_train.data.collate import FLASH
from dft_train.data.dataset import PackedSplit
from dft_train.data.sampler import Layout, train_layout
from dft_train.plan.memory import PARTS, MemoryPlan, MemoryRequest, predict
from dft_train.plan.shape import measure
from dft_train.ranks import launch
from dft_train.settings.arguments import Settings
from dft_train.settings.deepspeed_config import zero_stage

GIB = 1 << 30
CONTEXT_GIB = 1.0
"""What a GPU's context, its libraries' workspaces and its allocator's gaps take of it, roughly."""


class Device(NamedTuple):
    name: str
    bytes: int
    """For one rank."""


class Way(NamedTuple):
    """One way to need less memory."""

    flag: str
    total: float
    """Bytes on one device, with it alone."""


def total_steps(packs: int, layout: Layout, args: TrainingArguments) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the run)."""
    per_epoch = -(-packs // layout.global_batch)
    return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def planned_layout(settings: Settings, args: TrainingArguments) -> Layout:
    """The run's; a dry run starts no ranks, and plans for the ones that it would start."""
    ranks = settings.num_gpus if settings.dry_run and settings.num_gpus else args.world_size
    return dataclasses.replace(train_layout(args), world_size=ranks)


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


def _largest(counts: np.ndarray, packs: int) -> int:
    """The sum of the `packs` largest counts: no micro-batch has more."""
    return int(np.sort(counts)[-packs:].sum()) if len(counts) else 0


def _precision(settings: Settings, args: TrainingArguments, config: Any) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype of the weights, what they are cast to where they compute)."""
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if args.deepspeed:
        return half or torch.float32, None
    if settings.torch_dtype in (None, "auto"):
        found = getattr(config.get_text_config(), "dtype", None) if settings.torch_dtype else None
        dtype = found if isinstance(found, torch.dtype) else torch.float32
    else:
        dtype = getattr(torch, settings.torch_dtype)
    return dtype, half if dtype is torch.float32 else None


def _adapter(settings: Settings, manifest: Manifest, seed: int) -> Callable[[Any], Any]:
    """What makes of a model the one that is trained: with --lora_r, fresh adapters and a frozen rest."""
    lora = settings.lora
    if lora is None or settings.eval_only:
        return lambda model: model

    def adapt(model: Any) -> Any:
        from dft_train.models.lora import adapt

        level = get_logger().level
        get_logger().setLevel(logging.WARNING)
        try:
            return adapt(model, lora, manifest, seed)
        finally:
            get_logger().setLevel(level)

    return adapt


def request_for(
    settings: Settings, args: TrainingArguments, config: Any, manifest: Manifest, split: PackedSplit, attention: str
) -> MemoryRequest:
    """The question to `memory.predict` for a run: the model's `config`, and the split that it is to compute."""
    dtype, autocast = _precision(settings, args, config)
    packs = args.per_device_train_batch_size
    shape = measure(
        config,
        attention=attention,
        dtype=dtype,
        tokens=max(_largest(split.tokens, packs), 2),
        autocast=autocast,
        trust_remote_code=settings.trust_remote_code,
        adapt=_adapter(settings, manifest, args.seed),
    )
    plugin = args.deepspeed_plugin if args.deepspeed else None
    return MemoryRequest(
        shape=shape,
        live=_largest(split.lives, packs),
        world_size=planned_layout(settings, args).world_size,
        weight_bytes=dtype.itemsize,
        checkpointing=bool(args.activation_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        device=args.device.type,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        fused_loss=settings.fused_loss != "off",
        deepspeed=plugin.deepspeed_config if plugin is not None else None,
    )


def _local_ranks(settings: Settings) -> int:
    return settings.num_gpus or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_of_rank(ranks: int) -> Device:
    """The GPU, or this machine's memory shared by its ranks (which is an Apple GPU's too)."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory)
    return Device("this machine's memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks)


def _with_zero(request: MemoryRequest, **section: Any) -> MemoryRequest:
    return dataclasses.replace(request, deepspeed={"zero_optimization": section})


def ways_to_save(request: MemoryRequest) -> list[Way]:
    """What would need less memory on each device, the best first. Each stands alone; they can be combined."""
    stage = zero_stage(request.deepspeed)
    away = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    changes: dict[str, MemoryRequest] = {}
    if not request.checkpointing:
        changes["--enable_gradient_checkpointing True"] = dataclasses.replace(request, checkpointing=True)
    if not request.fused_loss:
        changes["--fused_loss on"] = dataclasses.replace(request, fused_loss=True)
    if request.world_size > 1 and stage < 2:
        changes["--deepspeed ds_config/zero2.json"] = _with_zero(request, stage=2, reduce_bucket_size=2e8)
    if request.world_size > 1 and stage < 3:
        changes["--deepspeed ds_config/zero3.json"] = _with_zero(request, stage=3, stage3_prefetch_bucket_size=1e7)
    if request.device != "cpu":
        offload = _with_zero(request, stage=3, stage3_prefetch_bucket_size=1e7, **away)
        changes["--deepspeed ds_config/zero3_offload.json (slower; needs memory on the host)"] = offload
    now = predict(request).total
    found = [Way(flag, predict(changed).total) for flag, changed in changes.items()]
    return sorted((way for way in found if way.total < 0.95 * now), key=lambda way: way.total)


def _hints(settings: Settings, args: TrainingArguments, attention: str) -> list[str]:
    """Ways whose saving needs another measurement."""
    hints = []
    if args.per_device_train_batch_size > 1:
        hints.append("--per_device_train_batch_size 1 with more --gradient_accumulation_steps")
    if attention != FLASH and launch.has_accelerator():
        hints.append(f"--attn_implementation {FLASH} ({attention} keeps masks that grow with the square of a pack)")
    if settings.lora is None:
        hints.append("--lora_r 16 (trains an adapter: hardly any gradients and optimizer)")
    return [*hints, "packs of a smaller --max_length (`dft-prep pack`)"]


def _size(value: float) -> str:
    unit = next((unit for unit in ((GIB, "GiB"), (1 << 20, "MiB")) if value >= unit[0]), (1 << 10, "KiB"))
    return f"{value / unit[0]:,.1f} {unit[1]}"


def table(plan: MemoryPlan) -> list[str]:
    """One line a part."""
    lines = [f"  {name:12}{_size(getattr(plan, name)):>12}" for name in PARTS]
    lines.append(f"  {'together':12}{_size(plan.total):>12}")
    if plan.host:
        lines.append(f"  on the host, for each rank: {_size(plan.host)}")
    return lines


def as_json(request: MemoryRequest, plan: MemoryPlan, device: Device, fits: bool) -> dict[str, Any]:
    """For programs; bytes."""
    shape = request.shape
    parts = {name: int(getattr(plan, name)) for name in PARTS}
    return {
        "parameters": shape.parameters,
        "trained_parameters": shape.trainable,
        "tokens": shape.tokens,
        "live": request.live,
        "world_size": request.world_size,
        "memory": {**parts, "together": int(plan.total), "host": int(plan.host), "moment": plan.moment},
        "device": device._asdict(),
        "fits": fits,
    }


def report_memory(
    settings: Settings, args: TrainingArguments, config: Any, manifest: Manifest, split: PackedSplit, attention: str
) -> Mapping[str, Any]:
    """Log the prediction, whether it fits, and what would help; returns it for programs."""
    request = request_for(settings, args, config, manifest, split, attention)
    plan, device, shape = predict(request), device_of_rank(_local_ranks(settings)), request.shape
    need = plan.total + (CONTEXT_GIB * GIB if launch.has_accelerator() else 0)
    fits = need <= device.bytes
    stage = zero_stage(request.deepspeed)
    how = "no DeepSpeed" if request.deepspeed is None else f"ZeRO-{stage}"
    lines = [
        f"model: {shape.parameters:,} parameters, {shape.trainable:,} of them trained",
        f"memory for each of {request.world_size} devices at its peak ({how}, {request.optimizer}; a micro-batch of "
        f"{shape.tokens:,} tokens, {request.live:,} trained; the moment: {plan.moment}):",
        *table(plan),
    ]
    if not shape.followed:
        lines.append("  activations are not in it: this model's forward pass cannot be followed without its weights")
    context = f", with {CONTEXT_GIB:.0f} GiB for its context" if launch.has_accelerator() else ""
    lines.append(f"{'it fits' if fits else 'IT DOES NOT FIT'}: {device.name} has {_size(device.bytes)}{context}")
    if not fits:
        lines.append("what would help:")
        lines += [f"  {way.flag}: {_size(way.total)} together" for way in ways_to_save(request)]
        lines += [f"  {hint}" for hint in _hints(settings, args, attention)]
    get_logger().info("%s", "\n".join(lines))
    return as_json(request, plan, device, fits)


def print_plan(found: Mapping[str, Any]) -> None:
    """To stdout, as one line of JSON."""
    click.echo(json.dumps(found, sort_keys=True))
