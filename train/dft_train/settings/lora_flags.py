"""The flags of LoRA, and what they are once parsed. Called by `arguments`; imports neither torch nor peft."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dft_common.errors import DataError, SetupError
from dft_common.flags import Flag

ALL_LINEAR = "all-linear"
ADAPTER_CONFIG = "adapter_config.json"

LORA_FLAGS = (
    Flag(name="lora_r", kind="int", minimum=1, help="Train LoRA adapters of this rank, and not the model's weights."),
    Flag(name="lora_alpha", kind="float", help="The adapters' product is scaled by alpha / r. Default: 2 r."),
    Flag(name="lora_dropout", kind="float", default=0.0, minimum=0, maximum=1, help="Of the adapters' inputs."),
    Flag(
        name="lora_target_modules",
        metavar="NAME",
        kind="list",
        help="Ends of names of linear layers (q_proj v_proj). Default: all-linear, which is all but the head.",
    ),
    Flag(
        name="lora_modules_to_save",
        metavar="NAME",
        kind="list",
        help="Ends of names of layers that are trained whole beside the adapters (embed_tokens lm_head).",
    ),
    Flag(name="use_rslora", kind="bool", default=False, help="Scale by alpha / sqrt(r)."),
    Flag(
        name="merge_lora",
        kind="bool",
        default=False,
        help="The final model is the whole one, adapters merged into its weights; checkpoints stay adapters.",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """What adapters are trained."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    """Ends of names of linear layers, or ALL_LINEAR alone."""
    modules_to_save: tuple[str, ...]
    """Ends of names of layers that are trained whole."""
    rslora: bool


def base_of_adapter(directory: str) -> str | None:
    """The base model's name where `directory` holds an adapter, None where it holds something else."""
    path = Path(directory) / ADAPTER_CONFIG
    if not path.is_file() or (Path(directory) / "config.json").is_file():
        return None
    try:
        base = json.loads(path.read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise DataError(f"{path}: it names no base model", remedy='set its "base_model_name_or_path"')
    return base


def lora_settings(values: Mapping[str, Any], given: Mapping[str, Any]) -> LoraSettings | None:
    """None where no new adapter is asked for. Raises SetupError for flags of LoRA that would change nothing."""
    rank = values["lora_r"]
    base = base_of_adapter(values["model_name_or_path"] or "")
    if rank is not None and base is not None:
        raise SetupError(
            f"--lora_r {rank}: --model_name_or_path {values['model_name_or_path']} is an adapter already",
            remedy=f"leave --lora_r out to train it on, or start from its base model {base}",
        )
    if rank is None:
        for flag in LORA_FLAGS:
            if given.get(flag.name) and not (base is not None and flag.name == "merge_lora"):
                raise SetupError(
                    f"--{flag.name} without --lora_r: no new adapter is made",
                    remedy=f"give `--lora_r 16` too, or leave --{flag.name} out",
                )
        return None
    alpha = values["lora_alpha"]
    return LoraSettings(
        rank=rank,
        alpha=2.0 * rank if alpha is None else alpha,
        dropout=values["lora_dropout"],
        target_modules=tuple(values["lora_target_modules"] or (ALL_LINEAR,)),
        modules_to_save=tuple(values["lora_modules_to_save"] or ()),
        rslora=values["use_rslora"],
    )
