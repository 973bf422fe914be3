"""From `Settings` to transformers' TrainingArguments: renamed flags, precision, trackers. Called by `trainer`.

transformers 5 dropped `warmup_ratio` (now `warmup_steps` below 1) and `logging_dir` (now an environment
variable of its tensorboard callback); both keep the meaning they had.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainingArguments

from dft_common.errors import SetupError
from dft_common.logs import get_logger
from dft_train.metrics.trackers import check_trackers
from dft_train.ranks import launch
from dft_train.settings.arguments import Settings
from dft_train.settings.deepspeed_checks import refuse_mismatches, refuse_unknown_keys
from dft_train.settings.deepspeed_config import choose_precision, read_deepspeed, working_copy, zero_stage

_ALL_OF_WARMUP = 1 - 1e-9
_DEFAULTS: dict[str, Any] = {
    # A pack is a full sequence; eight of them in one would cost sdpa a mask of 64 times the size.
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "disable_tqdm": True,
    "log_level": "error",
    # Every parameter of a causal language model is used; looking for unused ones costs a pass over the graph.
    "ddp_find_unused_parameters": False,
    # It would put an average in place of a loss that is not finite, and wait for the device at every micro-batch.
    "logging_nan_inf_filter": False,
}


def _warm_up(settings: Settings, fields: dict[str, Any]) -> None:
    """`warmup_steps` wins where both are given, as it did."""
    if settings.warmup_ratio is not None and not fields.get("warmup_steps"):
        fields["warmup_steps"] = min(settings.warmup_ratio, _ALL_OF_WARMUP)


def _deepspeed(settings: Settings, fields: dict[str, Any]) -> None:
    path = fields.pop("deepspeed", None)
    config = read_deepspeed(path) if path else None
    precision = choose_precision(fields, settings.torch_dtype, config)
    fields.update(precision._asdict())
    if config is None:
        return
    if settings.eval_only and zero_stage(config) != 3:
        get_logger().info("evaluation alone: DeepSpeed is left out (only ZeRO-3 can evaluate without an optimizer)")
        return
    refuse_unknown_keys(config)
    fields["deepspeed"] = working_copy(config, precision)
    launch.stand_alone_environment()
    launch.build_no_cpu_ops()


def make_training_arguments(settings: Settings, *, evaluates: bool) -> TrainingArguments:
    """TrainingArguments for the run. `evaluates`: whether there is anything to evaluate. Opens the process group.

    Raises SetupError for what TrainingArguments refuses, in its words.
    """
    fields = {**_DEFAULTS, **settings.training}
    trackers = list(fields.pop("report_to", None) or ["none"])
    check_trackers(trackers)
    fields["report_to"] = "none" if trackers == ["none"] else trackers
    _warm_up(settings, fields)
    _deepspeed(settings, fields)
    if settings.logging_dir:
        os.environ["TENSORBOARD_LOGGING_DIR"] = settings.logging_dir
    if not launch.has_accelerator():
        fields["use_cpu"] = True
    if not evaluates:
        fields |= {"eval_strategy": "no", "eval_on_start": False}
    asked = [fields.pop(name, False) for name in ("gradient_checkpointing", "activation_checkpointing")]
    fields["activation_checkpointing"] = settings.gradient_checkpointing or any(asked)
    fields.setdefault("activation_checkpointing_kwargs", {"use_reentrant": False})
    try:
        with launch.meeting():
            args = TrainingArguments(output_dir=str(settings.output_dir), **fields)
            device_count = args.n_gpu
    except (ValueError, TypeError, ImportError) as error:
        raise SetupError(f"TrainingArguments: {error}", remedy="`dft-train --help_all` explains each field") from None
    if device_count > 1:
        # torch's DataParallel would split batches behind the sampler's back.
        launch.warn("one process trains on one device; start one per device with torchrun or deepspeed")
        args._n_gpu = 1
    if args.deepspeed:
        refuse_mismatches(args.hf_deepspeed_config)
        launch.join_ranks()
    return args
