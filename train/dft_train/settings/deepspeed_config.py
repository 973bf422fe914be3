"""A working copy of the user's DeepSpeed configuration: the file itself is never changed, nor meant otherwise.

Called by `training_arguments`. Explicit precision flags win over the file's `bf16` and `fp16` sections, and
16-bit weights are gathered when a model is saved. Every "auto" is left for transformers to fill, and what a step
needs and the file leaves out is "auto" too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dft_common.errors import SetupError

_STEP = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


class Precision(NamedTuple):
    bf16: bool
    fp16: bool


def read_deepspeed(value: str) -> dict[str, Any]:
    """The configuration in a file, or given as JSON text. Raises SetupError."""
    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text("utf-8")
        config = json.loads(text)
    except OSError as error:
        raise SetupError(
            f"--deepspeed {value}: {error.strerror}", remedy="give the path of a configuration, as ds_config/zero3.json"
        ) from None
    except ValueError as error:
        raise SetupError(f"--deepspeed {value}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise SetupError(f"--deepspeed {value}: found {type(config).__name__}, expected an object")
    return config


def _in_file(config: Mapping[str, Any], section: str) -> bool:
    return config.get(section, {}).get("enabled") is True


def choose_precision(training: Mapping[str, Any], dtype: str | None, config: Mapping[str, Any] | None) -> Precision:
    """From --bf16, --fp16, --torch_dtype, and the file where none of them speaks."""
    given = {name: training[name] for name in ("bf16", "fp16") if name in training}
    if any(given.values()) or len(given) == 2 or config is None:
        return Precision(bool(given.get("bf16")), bool(given.get("fp16")))
    by_dtype = {
        "float32": Precision(False, False),
        "bfloat16": Precision(True, False),
        "float16": Precision(False, True),
    }
    found = by_dtype.get(dtype or "", Precision(_in_file(config, "bf16"), _in_file(config, "fp16")))
    return Precision(given.get("bf16", found.bf16), given.get("fp16", found.fp16))


def working_copy(config: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    """The configuration that DeepSpeed gets."""
    copy = {**dict.fromkeys(_STEP, "auto"), **json.loads(json.dumps(config))}
    for section, enabled in zip(("bf16", "fp16"), precision, strict=True):
        if enabled or section in copy:
            copy[section] = {**copy.get(section, {}), "enabled": enabled}
    zero = copy.get("zero_optimization", {})
    if zero.get("stage") == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return copy


def zero_stage(config: Mapping[str, Any] | None) -> int:
    """0 without DeepSpeed."""
    return int((config or {}).get("zero_optimization", {}).get("stage", 0))
