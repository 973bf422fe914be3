"""Refusals of a DeepSpeed configuration, before anything is slow. Called by `trainer` and `training_arguments`.

DeepSpeed itself must be one that accumulates gradients right; a section that would make the ranks share a sequence,
or change the length of a step, would break num_valid_tokens; a number that the file and a flag give differently would
be an error only after the model is loaded; a key that DeepSpeed does not know, too.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from dft_common.errors import SetupError
from dft_train.settings.arguments import Settings
from dft_train.settings.deepspeed_config import read_deepspeed

LEAST = (0, 19)
LEAST_TEXT = ".".join(map(str, LEAST))
FLAGS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
}
"""Where the configuration has a number, and the flag that would give the same."""
_SHARED_SEQUENCES = "ranks are data-parallel only: those that share a sequence would count its tokens twice"
_OTHER_STEPS = "the pack index and the flags say what a step is"
REFUSED = {
    "pipeline.stages": _SHARED_SEQUENCES,
    "tensor_parallel.autotp_size": _SHARED_SEQUENCES,
    "sequence_parallel_size": _SHARED_SEQUENCES,
    "sequence_data_parallel_size": _SHARED_SEQUENCES,
    "elasticity.enabled": _OTHER_STEPS,
    "curriculum_learning.enabled": _OTHER_STEPS,
    "data_efficiency.enabled": _OTHER_STEPS,
    "autotuning.enabled": _OTHER_STEPS,
    "progressive_layer_drop.enabled": "packed and single conversations would no longer be the same",
}
"""Settings that may be absent, off, or 1."""


def check_installed() -> None:
    """Raises SetupError without DeepSpeed, and for one that is too old."""
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise SetupError(
            "--deepspeed: DeepSpeed is not installed",
            remedy=f"run `pip install 'deepspeed>={LEAST_TEXT}'`, or leave --deepspeed out",
        ) from None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < LEAST:
        raise SetupError(
            f"--deepspeed: found DeepSpeed {version}, expected {LEAST_TEXT} or later: earlier ones lose the gradient "
            "of all but the first micro-batch with CPU offload (DeepSpeed #7967, #7981)",
            remedy=f"run `pip install -U 'deepspeed>={LEAST_TEXT}'`",
        )


def _get(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def refuse_sections(config: Mapping[str, Any]) -> None:
    """Raises SetupError for a ZeRO stage that does not exist, and for what would break the normalisation."""
    stage = _get(config, "zero_optimization.stage")
    if stage is not None and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        raise SetupError(
            f"--deepspeed: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3",
            remedy="ds_config/zero2.json and ds_config/zero3.json are good beginnings",
        )
    for path, reason in REFUSED.items():
        value = _get(config, path)
        if value is True or value not in (None, False, 0, 1, "auto"):
            raise SetupError(
                f"--deepspeed: {path} is {value!r}: {reason}", remedy=f"leave {path.split('.')[0]} out of the file"
            )
    for name in ("total_num_steps", "warmup_num_steps"):
        if _get(config, f"scheduler.params.{name}") not in (None, "auto"):
            raise SetupError(
                f"--deepspeed: scheduler.params.{name} is a number, and the run has its own",
                remedy='write "auto" there, or use --lr_scheduler_type and --warmup_ratio instead of the section',
            )


def refuse_unknown_keys(config: Mapping[str, Any]) -> None:
    """Raises SetupError for a ZeRO section that DeepSpeed would refuse. Imports DeepSpeed."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    section = {name: value for name, value in config.get("zero_optimization", {}).items() if value != "auto"}
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise SetupError(f"--deepspeed: {where}: {first['msg']}", remedy="correct it in the file") from None


def adopt(settings: Settings) -> Settings:
    """`settings` with the numbers that only the DeepSpeed configuration gives. Raises SetupError for a bad one."""
    path = settings.training.get("deepspeed")
    if not path:
        return settings
    check_installed()
    if settings.training.get("save_only_model") and settings.training.get("load_best_model_at_end"):
        raise SetupError(
            "--save_only_model True and --load_best_model_at_end True: DeepSpeed takes the best model up from its own "
            "states, which such checkpoints leave out",
            remedy="leave --load_best_model_at_end out, and take the best checkpoint, whose path is in "
            "trainer_state.json (--metric_for_best_model keeps it whatever --save_total_limit says); or leave "
            "--save_only_model out",
        )
    config = read_deepspeed(path)
    refuse_sections(config)
    numbers = {flag: value for name, flag in FLAGS.items() if isinstance(value := _get(config, name), int | float)}
    return dataclasses.replace(settings, training={**numbers, **settings.training})


def refuse_mismatches(hf_config: Any) -> None:
    """Raises SetupError where file and flags differ. `hf_config`: HfTrainerDeepSpeedConfig of the arguments."""
    if hf_config is not None and hf_config.mismatches:
        found = "; ".join(text.removeprefix("- ds ").replace(" vs hf ", " but ") for text in hf_config.mismatches)
        raise SetupError(
            f"--deepspeed: the file and the flags differ: {found}",
            remedy='write "auto" in the file, or leave the flag out',
        )
