"""Where a saved model comes from: `README.md` for people and hubs, `dft.json` for programs. Called by `release`.

What a card says of data was written by others (names of sources, paths), so all of it is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dft_common import __version__
from dft_common.errors import printable
from dft_common.manifest import Manifest
from dft_train.settings.arguments import Settings
from dft_train.settings.deepspeed_config import zero_stage
from dft_train.settings.lora_flags import base_of_adapter

CARD_NAME = "README.md"
ORIGIN_NAME = "dft.json"
_METRICS = ("loss", "ce_loss", "avg_p_correct", "token_accuracy", "effective_weight", "entropy")
MARK = "<!-- written by dft-train: a README.md without this line is never replaced -->"
_PAPER = "https://arxiv.org/abs/2508.05629"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NAME = re.compile(r"[\w./@:+ -]+", re.ASCII)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~$!])")


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What a model was made from and how; the same for every checkpoint of a run."""

    toolkit_version: str
    libraries: dict[str, str]
    base_model: str
    kind: str
    """model, adapter, or merged (an adapter in its model's weights)."""
    dataset: dict[str, Any]
    recipe: dict[str, Any]


class Progress(NamedTuple):
    """How far the run was, and its last numbers."""

    step: int
    epoch: float | None
    training: dict[str, float]
    evaluation: dict[str, float]


def _dataset(manifest: Manifest) -> dict[str, Any]:
    train = manifest.splits.get("train")
    return {
        "fingerprint": manifest.fingerprint,
        "recipe_fingerprint": manifest.recipe_fingerprint,
        "rows": train.rows if train else 0,
        "tokens": train.tokens if train else 0,
        "trained_tokens": train.trained_tokens if train else 0,
        "sources": {
            source.name: {"conversations": source.counts.kept, "trained_tokens": source.counts.trained_tokens}
            for source in manifest.sources
        },
    }


def _recipe(settings: Settings, args: Any, max_length: int) -> dict[str, Any]:
    plugin = args.deepspeed_plugin if args.deepspeed else None
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    recipe: dict[str, Any] = {"objective": settings.objective, **settings.objective_options}
    if settings.objective == "dft":
        recipe["dft_alpha"] = str(settings.dft_alpha)
    recipe |= {
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "packs_per_step": batch,
        "max_length": max_length,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": args.seed,
        "ranks": args.world_size,
        "deepspeed_stage": zero_stage(plugin.deepspeed_config) if plugin is not None else None,
    }
    if settings.lora is not None:
        recipe |= {"lora_r": settings.lora.rank, "lora_alpha": settings.lora.alpha}
        recipe["lora_target_modules"] = " ".join(settings.lora.target_modules)
    return {name: value for name, value in recipe.items() if value is not None}


def make_origin(settings: Settings, args: Any, manifest: Manifest, *, adapter: bool) -> Origin:
    import torch
    import transformers

    return Origin(
        toolkit_version=__version__,
        libraries={"torch": str(torch.__version__), "transformers": transformers.__version__},
        base_model=base_of_adapter(settings.model_name_or_path) or settings.model_name_or_path,
        kind="adapter" if adapter else "model",
        dataset=_dataset(manifest),
        recipe=_recipe(settings, args, settings.max_length or manifest.recipe["max_length"]),
    )


def progress(state: Any) -> Progress:
    """From a TrainerState."""

    def last(mark: str) -> dict[str, float]:
        found: dict[str, Any] = next((line for line in reversed(state.log_history) if mark in line), {})
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    return Progress(state.global_step, state.epoch, last("learning_rate"), last("eval_loss"))


def _escaped(text: object) -> str:
    """`text` as Markdown that shows it, on one line."""
    line = " ".join(printable(str(text)).split())
    return _MARKDOWN.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _shown(value: object) -> str:
    """A number, a name as code, or any other text escaped."""
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"`{value}`" if isinstance(value, str) and _NAME.fullmatch(value) else _escaped(value)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(_shown(cell) for cell in row) + " |" for row in rows)])


def _front_matter(origin: Origin) -> str:
    """YAML; every text in it is a JSON string, which YAML reads as it is."""
    library = "peft" if origin.kind == "adapter" else "transformers"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if _HUB_ID.fullmatch(origin.base_model) and not Path(origin.base_model).exists():
        lines.append(f"base_model: {json.dumps(origin.base_model)}")
    tags = ["dft-toolkit", str(origin.recipe["objective"]), *(["lora"] if "lora_r" in origin.recipe else [])]
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


_LOAD = {
    "model": "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")\n',
    "adapter": "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
    'model = AutoPeftModelForCausalLM.from_pretrained(path, dtype="auto")\n',
}
_LOAD["merged"] = _LOAD["model"]


def _results(at: Progress) -> list[tuple[object, ...]]:
    """(metric, in training, in evaluation) for the metrics that say how good the model is."""
    rows = ((name, at.training.get(name, ""), at.evaluation.get(f"eval_{name}", "")) for name in _METRICS)
    return [row for row in rows if any(value != "" for value in row[1:])]


def _source_loss(at: Progress, source: str) -> object:
    """See `sums.evaluation_names`."""
    found = at.evaluation
    return found.get(f"eval_{source}/loss", found.get(f"eval_{source}_loss", ""))


def model_card(origin: Origin, at: Progress) -> str:
    """README.md."""
    what = {
        "model": "This is",
        "adapter": "This is a LoRA adapter of",
        "merged": "With a LoRA adapter merged in, this is",
    }
    data = origin.dataset
    sources = [(name, *counts.values(), _source_loss(at, name)) for name, counts in data["sources"].items()]
    epochs = "" if at.epoch is None else f" ({at.epoch:.4g} epochs)"
    results = _results(at)
    parts = [
        _front_matter(origin),
        MARK,
        f"# {_escaped(Path(origin.base_model).name)}, fine-tuned",
        f"{what[origin.kind]} {_shown(origin.base_model)} after {at.step:,} optimizer steps{epochs} of "
        f"dft-train {origin.toolkit_version} with the objective {_shown(origin.recipe['objective'])}"
        f"{f' (Dynamic Fine-Tuning, {_PAPER})' if origin.recipe['objective'] == 'dft' else ''}.",
        "## How to load it",
        f"```python\n{_LOAD[origin.kind]}tokenizer = AutoTokenizer.from_pretrained(path)\n```\n\n"
        "The tokenizer carries the chat template that the model was trained with.",
        "## Recipe",
        _table(("", ""), origin.recipe.items()),
        "## Data",
        f"{data['rows']:,} conversations, {data['tokens']:,} tokens, {data['trained_tokens']:,} of them trained; "
        f"fingerprint `{data['fingerprint']}`.",
        _table(("source", "conversations", "trained tokens", "evaluation loss"), sources),
        "## Results",
        _table(("", "training", "evaluation"), results) if results else "Nothing was logged yet.",
        "Versions: " + ", ".join(f"{name} {_escaped(version)}" for name, version in origin.libraries.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def origin_record(origin: Origin, at: Progress) -> Mapping[str, Any]:
    """dft.json."""
    return {**msgspec.to_builtins(origin), "progress": at._asdict()}


def is_ours(card: Path) -> bool:
    """Whether `card` may be replaced: it is not there, or a run wrote it."""
    return not card.exists() or MARK in card.read_text("utf-8", errors="replace")
