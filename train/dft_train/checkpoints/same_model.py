"""Whether a checkpoint is one of this run's model, before anything of it is loaded. Called by `loop` on every rank.

What would break while it is loaded, or would load and be another model, is refused: other tensors, adapters of another
scale, states of another optimizer. Other settings are the user's to change: a warning names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dft_common.errors import DataError
from dft_train.models import lora
from dft_train.ranks import launch
from dft_train.release.card import ORIGIN_NAME, Origin
from dft_train.weights.export import conversion_of, model_sources, planned_tensors

Shapes = dict[str, tuple[int, ...]]
_MAY_CHANGE = (
    "objective", "dft_alpha", "learning_rate", "lr_scheduler_type", "warmup", "weight_decay", "max_grad_norm",
    "precision",
)  # fmt: skip
"""Of `Origin.recipe`: what holds from the next step on."""
_PLATEAU = "reduce_lr_on_plateau"
"""Its rate is a state, and no function of the step."""


def _read(path: Path) -> dict[str, Any]:
    """Empty where there is none, as in a checkpoint that is only taken because its path was given."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _stored(checkpoint: Path) -> Shapes:
    shapes: Shapes = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _expected(model: Any) -> Shapes:
    if lora.is_adapted(model):
        tensors = planned_tensors(*lora.adapter_sources(model))
    else:
        sources = model_sources(model)
        tensors = planned_tensors(sources, conversion_of(model, sources))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _first_difference(found: Shapes, expected: Shapes) -> str | None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in expected:
            return f"it holds {name}, which this run's model does not have"
        if name not in found:
            return f"it holds no {name}"
        if found[name] != expected[name]:
            return f"its {name} is {list(found[name])}, this run's is {list(expected[name])}"
    return None


def _refuse_other_tensors(checkpoint: Path, model: Any) -> None:
    adapted = lora.is_adapted(model)
    if (checkpoint / lora.ADAPTER_WEIGHTS).is_file() != adapted:
        what = ("the whole model", "LoRA adapters")
        raise DataError(
            f"{checkpoint}: it holds {what[not adapted]}, and this run trains {what[adapted]}",
            remedy="go on with the --lora flags and the --model_name_or_path that the run had, or start anew in "
            "another --output_dir",
        )
    if problem := _first_difference(_stored(checkpoint), _expected(model)):
        raise DataError(
            f"{checkpoint}: its weights are those of another model: {problem}",
            remedy="go on with the --model_name_or_path and the --lora flags that the run had, or start anew in "
            "another --output_dir",
        )


def _refuse_other_scale(checkpoint: Path, model: Any) -> None:
    config = lora.adapter_config(model)
    found = _read(checkpoint / "adapter_config.json")
    for name, flag in (("lora_alpha", "--lora_alpha"), ("use_rslora", "--use_rslora")):
        now = getattr(config, name)
        if name in found and found[name] != now:
            raise DataError(
                f"{checkpoint}: its adapters were trained with a {name} of {found[name]}, this run's is {now}: they "
                "would be scaled otherwise",
                remedy=f"go on with {flag} {found[name]}",
            )
    base, now = found.get("base_model_name_or_path"), config.base_model_name_or_path
    if base != now:
        launch.warn("%s: its adapters were trained on %s, this run's model is %s: the same?", checkpoint, base, now)


def _compare_recipes(checkpoint: Path, now: Mapping[str, Any]) -> None:
    found = _read(checkpoint / ORIGIN_NAME).get("recipe", {})
    changed = {name: (value, now.get(name)) for name, value in found.items() if value != now.get(name)}
    on_plateau = _PLATEAU in (found.get("lr_scheduler_type"), now["lr_scheduler_type"])
    fixed = ("optimizer", "lr_scheduler_type", "learning_rate") if on_plateau else ("optimizer",)
    for name in fixed:
        if name in changed:
            before, after = changed[name]
            raise DataError(
                f"{checkpoint}: its {name} is {before}, this run's is {after}: its states would not fit",
                remedy=f"go on with the {name} that the run had, or start anew from its weights: "
                "`--model_name_or_path CHECKPOINT` and another --output_dir",
            )
    told = [f"{name} {changed[name][1]} (was {changed[name][0]})" for name in _MAY_CHANGE if name in changed]
    if told:
        launch.warn("%s: from here on with other settings: %s", checkpoint, ", ".join(told))


def check_same_model(checkpoint: Path, model: Any, origin: Origin) -> None:
    """Raises DataError where `checkpoint` cannot be gone on from with `model` and the settings in `origin`."""
    _refuse_other_tensors(checkpoint, model)
    if lora.is_adapted(model):
        _refuse_other_scale(checkpoint, model)
    _compare_recipes(checkpoint, origin.recipe)
