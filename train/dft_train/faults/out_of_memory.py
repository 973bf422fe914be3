"""Out of memory: one message that says where, how much there was, and which flags help this run. Used by `trainer`.

What the flags would save are `memory`'s predictions for this run's model, packs and DeepSpeed configuration. Where
these cannot be made, the flags are named without a number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dft_common.errors import SetupError

_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
"""In RuntimeErrors of allocators, of cuBLAS and NCCL, and of pinned memory. torch.OutOfMemoryError is one too."""
_PLACES = (
    # name of a function, part of its file's path, what is said
    ("evaluate", "dft_train", "in an evaluation"),
    ("save_checkpoint", "dft_train", "while saving a checkpoint"),
    ("save_final", "dft_train", "while saving the final model"),
    ("step", "optim", "in the optimizer's step"),
    ("step", "deepspeed", "in the optimizer's step"),
    ("_engine_run_backward", "torch", "in the backward pass"),
    ("linear_dft_loss", "dft_train", "in the loss"),
    ("logits_dft_loss", "dft_train", "in the loss"),
    ("compute_loss", "dft_train", "in the forward pass"),
    ("_prepare_for_training", "transformers", "while the optimizer was set up"),
    ("load_model", "dft_train", "while the model was loaded"),
    ("_make_trainer", "dft_train", "while the model was loaded"),
)
LOADING = ("while the model was loaded", "while the optimizer was set up")
_GIB = 1 << 30
_FRAGMENTED = 0.1
"""Of the device: memory that torch holds and no tensor has, above which the allocator is worth a word."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """What the advice depends on."""

    where: str
    """One of the texts of _PLACES."""
    on_gpu: bool
    train_batch: int
    eval_batch: int
    attention: str
    max_length: int
    checkpointing: bool
    fused_loss: bool
    zero_stage: int
    offloads: bool
    world_size: int
    lora: bool
    half: bool
    """Whether the weights compute in 16 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes, of the GPU or of this machine."""

    allocated: int
    """By tensors; on a CPU the whole process."""
    held: int
    """By torch's allocator, for tensors past and to come."""
    total: int


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _WORDS)
    )


def where_of(error: BaseException) -> str:
    """Which part of a run asked for the memory: from the names of the functions that the error came through."""
    frames = [(frame.name, frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    for name, path, said in _PLACES:
        if any(frame == name and path in file for frame, file in frames):
            return said
    return "before the first step"


def memory_now() -> Memory | None:
    """None where the system does not tell."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        return Memory(allocated=torch.cuda.memory_allocated(), held=torch.cuda.memory_reserved(), total=total)
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        used = int(Path("/proc/self/statm").read_text().split()[1]) * page
        return Memory(allocated=used, held=used, total=os.sysconf("SC_PHYS_PAGES") * page)
    except (OSError, ValueError, IndexError):
        return None


def hints(situation: Situation) -> list[str]:
    """What helps here and has no prediction, what costs nothing first."""
    found = []
    if situation.where in LOADING:
        found.append("--torch_dtype bfloat16 (with --deepspeed): half of what the weights take")
    elif situation.where == "in an evaluation" and situation.eval_batch > 1:
        found.append(f"--per_device_eval_batch_size 1: activations and logits are 1/{situation.eval_batch}")
    elif situation.where != "in an evaluation" and situation.train_batch > 1:
        found.append(
            f"--per_device_train_batch_size 1 and --gradient_accumulation_steps times {situation.train_batch}: the "
            f"same steps, activations are 1/{situation.train_batch}"
        )
    if situation.where not in LOADING:
        if situation.on_gpu and situation.attention != "flash_attention_2":
            tokens = situation.max_length * max(situation.train_batch, 1)
            found.append(
                f"--attn_implementation flash_attention_2: no mask of {tokens:,} x {tokens:,} tokens "
                f"({tokens * tokens * 2 / _GIB:.2f} GiB), as {situation.attention} has"
            )
        if not situation.half:
            found.append("--bf16 True: activations in 16 bits, half of them in float32")
        shorter = situation.max_length // 2
        found.append(f"`dft-prep pack DATASET --max_length {shorter}` and --max_length {shorter}: half of activations")
    if not situation.lora:
        found.append("--lora_r 16: hardly any gradients and optimizer")
    return found


def known_ways(situation: Situation) -> list[str]:
    """The flags that `plan.ways_to_save` predicts for, without its numbers."""
    found = []
    if not situation.checkpointing:
        found.append("--enable_gradient_checkpointing True: one layer's activations and each layer's input, not all")
    if not situation.fused_loss:
        found.append("--fused_loss on: the logits are never held")
    if situation.world_size > 1 and situation.zero_stage < 3:
        found.append(f"--deepspeed ds_config/zero3.json: 1/{situation.world_size} of weights, gradients and optimizer")
    if situation.on_gpu and not situation.offloads:
        found.append("--deepspeed ds_config/zero3_offload.json: weights and optimizer in the host's memory; slower")
    return found


def describe(error: BaseException, situation: Situation, memory: Memory | None, ways: Sequence[str]) -> SetupError:
    """The message. `ways`: flags with what they save."""
    first = (str(error).strip() or "MemoryError").splitlines()[0]
    lines = [f"out of memory {situation.where}: {first[:300]}"]
    if memory is not None:
        device = "of the GPU" if situation.on_gpu else "of this machine, by this process"
        lines.append(
            f"  {memory.allocated / _GIB:.2f} GiB of {memory.total / _GIB:.2f} GiB {device} were in use"
            + (f", {(memory.held - memory.allocated) / _GIB:.2f} GiB held free" if situation.on_gpu else "")
        )
    advice = [*ways, *hints(situation)]
    if memory is not None and memory.held - memory.allocated > _FRAGMENTED * memory.total:
        advice.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment: fewer gaps")
    bullets = "".join(f"\n    {way}" for way in advice)
    return SetupError("\n".join(lines), remedy=f"what helps here; `dft-train --dry_run` predicts it all:{bullets}")


@contextlib.contextmanager
def explained(look: Callable[[str], Situation], predict: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Around loading and training. `look` makes a Situation of where it happened; `predict` the flags with numbers.

    Raises SetupError in place of what any allocator raises.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        situation, memory = look(where_of(error)), memory_now()
        try:
            ways = predict() or known_ways(situation)
        except Exception:
            # Whatever stands in the way of a prediction, the message is what matters now.
            ways = known_ways(situation)
        raise describe(error, situation, memory, ways) from None


def look_at(settings: Any, args: Any, *, attention: str, max_length: int, where: str) -> Situation:
    """From Settings and TrainingArguments."""
    from dft_train.ranks import launch
    from dft_train.settings.deepspeed_config import zero_stage

    config = args.deepspeed if isinstance(args.deepspeed, dict) else None
    zero = (config or {}).get("zero_optimization", {})
    return Situation(
        where=where,
        on_gpu=launch.has_accelerator(),
        train_batch=args.per_device_train_batch_size,
        eval_batch=args.per_device_eval_batch_size,
        attention=attention,
        max_length=max_length,
        checkpointing=bool(args.activation_checkpointing),
        fused_loss=settings.fused_loss != "off",
        zero_stage=zero_stage(config),
        offloads=any((zero.get(f"offload_{what}") or {}).get("device") == "cpu" for what in ("param", "optimizer")),
        world_size=args.world_size,
        lora=settings.lora is not None,
        half=args.bf16 or args.fp16,
    )


def predicted_ways(settings: Any, args: Any, config: Any, manifest: Any, split: Any, attention: str) -> list[str]:
    """Flags with the GiB that they would save on each device, the most first."""
    from dft_train.plan.forecast import request_for, ways_to_save
    from dft_train.plan.memory import predict

    request = request_for(settings, args, config, manifest, split, attention)
    now = predict(request).total
    return [f"{way.flag}: saves about {(now - way.total) / _GIB:.2f} GiB" for way in ways_to_save(request)]
