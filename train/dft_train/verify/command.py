"""`dft-train verify`: the same model whatever the layout? Asked of the user's own model and dataset. Called by `cli`.

1. an excerpt of the dataset (`excerpt`), and where the model is too large one of its shape with fewer layers;
2. two optimizer steps of it in each layout, each in processes of its own (`layouts`);
3. losses, gradients and weights of each compared with the first's, and the leak test of the guards; a table.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dft_common import logs
from dft_common.errors import SetupError, printable
from dft_train.data.collate import FLASH
from dft_train.guards.first_batch import FILE_NAME
from dft_train.plan.shape import count_parameters, few_layers
from dft_train.ranks import launch
from dft_train.verify.excerpt import write_excerpt
from dft_train.verify.flags import as_words
from dft_train.verify.layouts import Layout, Outcome, layouts, run_layout

STEPS = 2
_TOLERANCES = {"loss": (1e-4, 0.02), "norm": (1e-3, 0.05), "gradient": (2e-3, 0.2), "weights": (2e-4, 0.02)}
"""Relative, in float32 and in bfloat16."""
_BYTES_EACH = 16
"""Of a parameter in float32 with its gradient and AdamW's moments."""
_CPU_PARAMETERS = 300_000_000
"""On a CPU a larger model would take minutes a layout."""
_FLOOR = 1e-3
"""A tensor whose norm is below this part of the whole's is compared with that: noise around zero is no difference."""


class Numbers(NamedTuple):
    """What a layout's run left."""

    losses: list[float]
    norms: list[float]
    """Empty where none is logged: DeepSpeed's stage 0 in float32."""
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


class Row(NamedTuple):
    """One line of the table: losses, and the largest relative differences from the first layout."""

    name: str
    losses: list[float]
    loss: float
    norm: float | None
    """None where the layout logs no norm."""
    gradient: float
    weights: float
    message: str
    """Where the run failed."""

    def wrong(self, bf16: bool) -> list[str]:
        """What is above its tolerance; a number that is none counts as above."""
        if self.message:
            return ["run"]
        known = {name: value for name in _TOLERANCES if (value := getattr(self, name)) is not None}
        return [name for name, value in known.items() if not value <= _TOLERANCES[name][bf16]]


def _load(folder: Path, pattern: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        found |= load_file(path)
    return found


def read_numbers(directory: Path) -> Numbers:
    """From the files of a run."""
    history = json.loads((directory / "trainer_state.json").read_bytes())["log_history"]
    lines = [line for line in history if "loss" in line]
    return Numbers(
        losses=[line["loss"] for line in lines],
        norms=[line["grad_norm"] for line in lines if "grad_norm" in line],
        gradients=[_load(directory / "gradients", f"gradients-{step + 1}.safetensors") for step in range(STEPS)],
        weights=_load(directory, "*.safetensors"),
    )


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-12)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.float().norm()) ** 2 for tensor in tensors.values()))


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Over the tensors: the norm of the difference by the norm of what is expected."""
    if found.keys() != expected.keys() or not expected:
        return math.inf
    floor = _FLOOR * _norm(expected)
    differences = [
        float((found[name].float() - tensor.float()).norm()) / max(float(tensor.float().norm()), floor, 1e-30)
        for name, tensor in expected.items()
    ]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def compare(outcome: Outcome, reference: Numbers) -> Row:
    """A layout's line."""
    if outcome.exit_code:
        nothing = (math.nan,) * 4
        return Row(outcome.layout.name, [], *nothing, message=f"exit {outcome.exit_code}: {printable(outcome.message)}")
    numbers = read_numbers(outcome.directory)
    pairs = zip(numbers.gradients, reference.gradients, strict=True)
    return Row(
        outcome.layout.name,
        numbers.losses,
        loss=max(map(_relative, numbers.losses, reference.losses)),
        norm=max(map(_relative, numbers.norms, reference.norms)) if numbers.norms else None,
        gradient=max(largest_difference(ours, theirs) for ours, theirs in pairs),
        weights=largest_difference(numbers.weights, reference.weights),
        message="",
    )


def _ranks() -> int:
    """1, 2 or 4: with accelerators as many as there are, else 2."""
    if not launch.has_accelerator():
        return 2
    return max(count for count in (1, 2, 4) if count <= torch.accelerator.device_count())


def choose_layers(asked: int | None, parameters: int, ranks: int) -> int:
    """How many layers of the model's shape to verify; 0: the model itself."""
    if asked is not None:
        return asked
    if torch.cuda.is_available():
        fits = parameters * _BYTES_EACH < 0.6 * torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        fits = parameters <= _CPU_PARAMETERS and parameters * _BYTES_EACH * ranks < 0.6 * memory
    return 0 if fits else 2


def _model(values: Mapping[str, Any], ranks: int, folder: Path) -> tuple[str, str]:
    """(directory or id of the model to verify, what it is in words)."""
    name, trusts = values["model_name_or_path"], values["trust_remote_code"]
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusts)
    except (OSError, ValueError):
        # `train` says it better, in every layout.
        return name, name
    parameters = count_parameters(config, trusts)
    layers = choose_layers(values["verify_layers"], parameters, ranks)
    if not layers:
        return name, f"{name} ({parameters:,} parameters)"
    torch.manual_seed(0)
    small = AutoModelForCausalLM.from_config(few_layers(config, layers), trust_remote_code=trusts, dtype=torch.float32)
    small.save_pretrained(folder)
    for path in Path(name).glob("*token*") if Path(name).is_dir() else ():
        shutil.copy(path, folder / path.name)
    count = sum(parameter.numel() for parameter in small.parameters())
    return str(folder), f"the shape of {name} with {layers} layers and random weights ({count:,} parameters)"


def _arguments(given: Mapping[str, Any], model: str, dataset: Path, bf16: bool) -> list[str]:
    """What all layouts have in common."""
    words = [*as_words(given), "--model_name_or_path", model, "--dataset_dir", str(dataset), "--max_steps", str(STEPS)]
    words += ["--bf16", str(bf16), "--torch_dtype", "bfloat16" if bf16 else "float32", "--logging_steps", "1"]
    words += ["--lr_scheduler_type", "constant", "--save_strategy", "no", "--eval_strategy", "no"]
    return words


def _leak(directory: Path) -> dict[str, float]:
    """What the guards of the first layout measured."""
    path = directory / FILE_NAME
    return json.loads(path.read_bytes())["numbers"] if path.is_file() else {}


def _text(rows: list[Row], leak: Mapping[str, float], about: str, bf16: bool, good: bool) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{about}, {'bfloat16' if bf16 else 'float32'}", ""]
    lines.append(f"{'layout':{width}}  {'loss 1':>10} {'loss 2':>10}  differences: loss  norm     gradient weights")
    for row in rows:
        if row.message:
            lines.append(f"{row.name:{width}}  FAILED  {row.message}")
            continue
        losses = " ".join(f"{loss:10.6f}" for loss in row.losses)
        differences = (row.loss, row.norm, row.gradient, row.weights)
        numbers = "  ".join(f"{'-':7}" if value is None else f"{value:7.1e}" for value in differences)
        wrong = row.wrong(bf16)
        lines.append(
            f"{row.name:{width}}  {losses}       {numbers}  {'DIFFERS: ' + ', '.join(wrong) if wrong else 'ok'}"
        )
    limits = ", ".join(f"{name} {both[bf16]:g}" for name, both in _TOLERANCES.items())
    lines += ["", f"allowed: {limits} (relative, largest over both steps and all tensors)"]
    if leak:
        lines.append(
            f"packed conversations: {leak['others']:.1e} when the others of the pack change, {leak['alone']:.1e} from "
            "the same alone (relative, of the last hidden states)"
        )
    lines.append("all layouts train the same model" if good else "NOT all layouts train the same model")
    return "\n".join(lines)


def _as_json(rows: list[Row], leak: Mapping[str, float], about: str, bf16: bool, good: bool) -> str:
    made = [{**row._asdict(), "differs": row.wrong(bf16)} for row in rows]
    finite = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in made
    ]
    return json.dumps({"model": about, "bf16": bf16, "layouts": finite, "packing": dict(leak), "good": good}, indent=1)


def _outcomes(chosen: list[Layout], arguments: list[str], folder: Path) -> list[Outcome]:
    found = []
    for at, layout in enumerate(chosen):
        logs.get_logger().info("%s ...", layout.name)
        found.append(run_layout(layout, arguments, folder / f"layout-{at}"))
    return found


def run(values: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    """Verify with the parsed flags: `values` of all, and those `given`. Prints the result; the exit code."""
    logs.setup()
    launch.quieten()
    launch.quieten_transformers()
    if not launch.has_accelerator():
        # A process whose OpenMP threads have worked must not fork ranks that use them too.
        torch.set_num_threads(1)
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    if has_deepspeed:
        # Now, so that ranks that are forked have it.
        import deepspeed  # noqa: F401
    from dft_train import loop, trainer  # noqa: F401
    from dft_train.settings import training_arguments  # noqa: F401

    bf16 = bool(values["bf16"]) or (values["attn_implementation"] == FLASH and launch.has_accelerator())
    ranks = _ranks()
    tokens = values["verify_tokens"] or (4096 if launch.has_accelerator() else 512)
    with tempfile.TemporaryDirectory(prefix="dft-verify-") as name:
        folder = Path(name)
        write_excerpt(Path(values["dataset_dir"]), folder / "dataset", values["max_length"], tokens)
        model, about = _model(values, ranks, folder / "model")
        arguments = _arguments(given, model, folder / "dataset", bf16)
        chosen = layouts(ranks, bf16=bf16, deepspeed=values["deepspeed"], has_deepspeed=has_deepspeed)
        outcomes = _outcomes(chosen, arguments, folder)
        if outcomes[0].exit_code:
            raise SetupError(f"the first layout ({chosen[0].name}) does not train: {printable(outcomes[0].message)}")
        reference = read_numbers(outcomes[0].directory)
        rows = [compare(outcome, reference) for outcome in outcomes]
        leak = _leak(outcomes[0].directory)
    good = not any(row.wrong(bf16) for row in rows)
    show = _as_json if values["format"] == "json" else _text
    click.echo(show(rows, leak, about, bf16, good))
    return 0 if good else 1
