"""The flags of `dft-train train`, and what they are once parsed. Called by `cli`.

Nothing here imports torch or transformers, so that `--help` answers at once. A flag that is neither ours
nor listed here may still be a field of `TrainingArguments`: `training_fields` knows those, and is imported
only when one is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dft_common.build_flags import BUILD_FLAGS, DATA_FILES, MAX_LENGTH, TOKENIZER
from dft_common.errors import SetupError
from dft_common.flags import Flag
from dft_train.objectives import OBJECTIVES, OPTIONS
from dft_train.schedule import AlphaSchedule, parse_alpha
from dft_train.settings.lora_flags import LORA_FLAGS, LoraSettings, lora_settings

DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEFAULTS = {name: value for objective in OBJECTIVES.values() for name, value in objective.options.items()}
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
FUSED_LOSS = ("auto", "on", "off")

OWN_FLAGS = (
    Flag(name="model_name_or_path", help="Directory or hub id of the model to train. Required."),
    Flag(name="dataset_dir", help="A dataset that `dft-prep build` wrote. This or --data_files is required."),
    Flag(name="output_dir", help="Directory of the run: checkpoints, final model, trainer_state.json. Required."),
    dataclasses.replace(MAX_LENGTH, default=None, help="Tokens of a pack. Default: what the dataset was built for."),
    Flag(
        name="torch_dtype",
        aliases=("dtype",),
        choices=DTYPES,
        help="Of the weights when loaded; float32 also turns bf16 off. Default: DeepSpeed's precision, else float32.",
    ),
    Flag(name="attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2 (without a GPU: sdpa)."),
    Flag(name="trust_remote_code", kind="bool", default=False, help="Run the code that a model's repository brings."),
    Flag(
        name="enable_gradient_checkpointing",
        kind="bool",
        default=False,
        help="Compute activations again in the backward pass: less memory, more time.",
    ),
    Flag(
        name="objective",
        choices=tuple(OBJECTIVES),
        default="dft",
        help="What each trained token's cross entropy is weighed by, held constant: "
        + "; ".join(f"{name}: {objective.formula}" for name, objective in OBJECTIVES.items())
        + ".",
    ),
    Flag(
        name="dft_alpha",
        default=str(_DEFAULTS["dft_alpha"]),
        help="0 is SFT, 1 the DFT of the paper; 0:0.7 goes from one to the other over the run, linearly, cosine:0:0.7 "
        "by half a cosine, 0:0.7@0.1 in the first tenth of its steps.",
    ),
    Flag(
        name="power_k",
        kind="float",
        default=_DEFAULTS["power_k"],
        minimum=0,
        help="Exponent of the power objective: 0 is SFT, 1 the DFT of the paper.",
    ),
    Flag(
        name="threshold_low",
        kind="float",
        default=_DEFAULTS["threshold_low"],
        minimum=0,
        maximum=1,
        help="The least p_correct that the threshold objective trains on.",
    ),
    Flag(
        name="threshold_high",
        kind="float",
        default=_DEFAULTS["threshold_high"],
        minimum=0,
        maximum=1,
        help="The greatest.",
    ),
    Flag(
        name="eaft_top_k",
        kind="int",
        default=_DEFAULTS["eaft_top_k"],
        minimum=2,
        help="Tokens of the vocabulary that the entropy of the eaft objective is taken over, the most likely ones.",
    ),
    Flag(
        name="eaft_alpha",
        kind="float",
        default=_DEFAULTS["eaft_alpha"],
        minimum=0,
        help="Exponent of that entropy: 0 is SFT.",
    ),
    Flag(
        name="fused_loss",
        choices=FUSED_LOSS,
        default="auto",
        help="on: the logits are never held; off: all of them at once, as a reference; auto: on wherever the head is a "
        "plain linear layer.",
    ),
    Flag(
        name="router_aux_loss_coef",
        kind="float",
        minimum=0,
        help="Weight of a mixture-of-experts model's auxiliary loss; 0: none. Default: its configuration's.",
    ),
    *LORA_FLAGS,
    Flag(
        name="on_nan",
        choices=("stop", "skip"),
        default="stop",
        help="A step whose loss or gradient is NaN or infinite is never applied: end the run, or leave it out.",
    ),
    Flag(
        name="guards",
        kind="bool",
        default=True,
        help="At the first batch, check the loss and the packing against the model itself (seconds).",
    ),
    Flag(name="eval_only", kind="bool", default=False, help="Evaluate, write eval_results.json, train nothing."),
    Flag(name="eval_split", default="validation", help="The split to evaluate."),
    Flag(name="dry_run", kind="bool", default=False, help="Check everything, print the plan, train nothing."),
    Flag(name="warmup_ratio", kind="float", minimum=0, maximum=1, help="Warm-up as a fraction of all steps."),
    Flag(
        name="peak_tflops",
        kind="float",
        minimum=0,
        help="Peak of one device in 10^12 FLOPs a second, for mfu. Default: known by the device's name; CPU: no mfu.",
    ),
    Flag(name="logging_dir", help="Where tensorboard's files go. Default: runs/ in --output_dir."),
    Flag(
        name="num_gpus",
        kind="int",
        minimum=1,
        help="Start this many ranks here, one a GPU (on the CPU where there is none). Not under another launcher.",
    ),
    Flag(name="local_rank", kind="int", help="Launchers pass it; LOCAL_RANK in the environment is what counts."),
    Flag(
        name="resume_from_checkpoint",
        help="True: the newest whole checkpoint in --output_dir, or a fresh start where there is none; or one's path.",
    ),
)

_SHARED_WITH_BUILD = ("output_dir", "max_length", "seed")
_BUILD_ONLY = tuple(
    dataclasses.replace(TOKENIZER, aliases=(), help="For --data_files. Default: the model's.")
    if flag is TOKENIZER
    else flag
    for flag in BUILD_FLAGS
    if flag.name not in _SHARED_WITH_BUILD
)


def _flag(name: str, kind: Any = "str", help: str = "", metavar: str | None = None) -> Flag:
    return Flag(name=name, kind=kind, help=help, metavar=metavar)


TRAINING_FLAGS = (
    _flag("bf16", "bool", "Train in bfloat16 (with DeepSpeed: float32 master weights)."),
    _flag("fp16", "bool", "Train in float16 with loss scaling."),
    _flag("num_train_epochs", "float", "Passes over the packs. Default: 3."),
    _flag("max_steps", "int", "Optimizer steps; wins over the epochs. Default: -1, by the epochs."),
    _flag("per_device_train_batch_size", "int", "Packs of a micro-batch, on each rank. Default: 1."),
    _flag("per_device_eval_batch_size", "int", "The same in evaluation. Default: 1."),
    _flag("gradient_accumulation_steps", "int", "Micro-batches of an optimizer step, on each rank. Default: 1."),
    _flag("learning_rate", "float", "Peak learning rate. Default: 5e-5."),
    _flag("lr_scheduler_type", "str", "linear, cosine, constant, ... Default: linear."),
    _flag("warmup_steps", "float", "Warm-up in steps (below 1: as a fraction). Default: 0."),
    _flag("weight_decay", "float", "Default: 0."),
    _flag("max_grad_norm", "float", "Gradients are clipped to this norm; 0: never. Default: 1.0."),
    _flag("optim", "str", "Optimizer. Default: adamw_torch_fused."),
    _flag("eval_strategy", "str", "no, steps or epoch. Default: no."),
    _flag("eval_steps", "float", "Steps between evaluations. Default: --logging_steps."),
    _flag("save_strategy", "str", "no, steps, epoch or best. Default: steps."),
    _flag("save_steps", "float", "Steps between checkpoints. Default: 500."),
    _flag("save_total_limit", "int", "Checkpoints to keep. Default: all."),
    _flag("save_only_model", "bool", "No optimizer state in checkpoints: smaller, but they cannot be resumed."),
    _flag("logging_steps", "float", "Steps between log lines. Default: 500."),
    _flag("report_to", "list", "wandb, swanlab, tensorboard, trackio or none. Default: none.", "TRACKER"),
    _flag("run_name", "str", "Name of the run in the tracker."),
    _flag("deepspeed", "str", "A DeepSpeed configuration (ds_config/zero3.json); a copy of it is worked on."),
    _flag("seed", "int", "Of everything random, and of the build with --data_files. Default: 42."),
    _flag("data_seed", "int", "Of the packs' order. Default: --seed."),
    _flag("dataloader_num_workers", "int", "Processes that read batches ahead. Default: 0, in the trainer's own."),
    _flag("remove_unused_columns", "bool", "Accepted; batches hold only what the model takes."),
    _flag("ddp_find_unused_parameters", "bool", "Without DeepSpeed, for models whose parameters are not all used."),
)

STATIC_FLAGS = (*OWN_FLAGS, *TRAINING_FLAGS, *_BUILD_ONLY)
"""Everything that `--help` lists."""

REFUSED = {
    "label_smoothing_factor": "the DFT loss has its own row weights",
    "auto_find_batch_size": "a step is defined by the batch size",
    "dataloader_drop_last": "the last step of an epoch is filled up, so that every pack is trained once",
    "train_sampling_strategy": "the pack index gives the order",
    "use_liger_kernel": "it replaces the loss",
    "fsdp": "use --deepspeed, or plain data parallelism",
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "it has not been tested with the loss inside the head",
    ),
    "save_on_each_node": "the nodes share the file system of --output_dir",
    "parallelism_config": "ranks are data-parallel only",
    "include_num_input_tokens_seen": "tokens_seen is always logged",
}
"""Fields of TrainingArguments that would be ignored, or would break what the trainer promises."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A parsed command line. `training` holds the TrainingArguments fields that were given, nothing else."""

    model_name_or_path: str
    output_dir: Path
    dataset_dir: Path | None
    build: Mapping[str, Any]
    """Flags of `dft-prep build` that were given, `data_files` among them; empty with --dataset_dir."""
    max_length: int | None
    torch_dtype: str | None
    attn_implementation: str
    trust_remote_code: bool
    gradient_checkpointing: bool
    objective: str
    dft_alpha: AlphaSchedule
    objective_options: Mapping[str, float]
    """Options of the objective, all of them; empty for dft, whose alpha is a schedule."""
    fused_loss: str
    router_aux_loss_coef: float | None
    lora: LoraSettings | None
    """None: no new adapter is made."""
    merge_lora: bool
    on_nan: str
    guards: bool
    eval_only: bool
    eval_split: str
    dry_run: bool
    warmup_ratio: float | None
    num_gpus: int | None
    """Ranks to start on this machine; None: this process is all there is, or a launcher's."""
    peak_tflops: float | None
    logging_dir: str | None
    resume: str | None
    """`True`, a path, or None."""
    training: Mapping[str, Any]


def _required(values: Mapping[str, Any], name: str) -> str:
    if not values[name]:
        raise SetupError(f"--{name} is missing", remedy=f"give `--{name} VALUE`; `dft-train --help` lists every flag")
    return values[name]


def _build_flags(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    if bool(values["dataset_dir"]) == bool(values[DATA_FILES.name]):
        found = "both" if values["dataset_dir"] else "neither"
        raise SetupError(
            f"--dataset_dir or --data_files: found {found}, expected one of them",
            remedy="`--dataset_dir OUT` for a dataset that `dft-prep build` wrote, `--data_files F...` to build it now",
        )
    names = [flag.name for flag in BUILD_FLAGS if flag.name != "output_dir"]
    return {name: given[name] for name in names if name in given}


def _objective_options(objective: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, float]:
    for option, taker in OPTIONS.items():
        if option in given and taker != objective:
            raise SetupError(
                f"--{option} belongs to --objective {taker}, found --objective {objective}",
                remedy=f"leave --{option} out, or give `--objective {taker}`",
            )
    if objective == "threshold" and values["threshold_low"] > values["threshold_high"]:
        raise SetupError(
            f"--threshold_low {values['threshold_low']} is above --threshold_high {values['threshold_high']}",
            remedy="no token would be trained on: exchange them",
        )
    return {name: values[name] for name in OBJECTIVES[objective].options if name != "dft_alpha"}


def _resume(value: str | None) -> str | None:
    return None if value is None or value.lower() in ("false", "no", "") else value


def make_settings(values: Mapping[str, Any], given: Mapping[str, Any], training_names: frozenset[str]) -> Settings:
    """Settings from parsed flags: `values` of all, and those `given` on the command line or in the config file."""
    for name, reason in REFUSED.items():
        if given.get(name):
            raise SetupError(f"--{name} is not supported: {reason}", remedy=f"leave --{name} out")
    if values["attn_implementation"] not in ATTENTIONS:
        raise SetupError(
            f"--attn_implementation {values['attn_implementation']}: expected one of {', '.join(ATTENTIONS)}",
            remedy="these are the ones in which packed conversations are known not to see each other",
        )
    build = _build_flags(values, given)
    own = ("torch_dtype", "attn_implementation", "trust_remote_code", "objective", "fused_loss", "max_length")
    own += ("router_aux_loss_coef", "merge_lora")
    own += ("guards",)
    more = ("on_nan", "eval_only", "eval_split", "dry_run", "warmup_ratio", "num_gpus", "peak_tflops", "logging_dir")
    return Settings(
        model_name_or_path=_required(values, "model_name_or_path"),
        output_dir=Path(_required(values, "output_dir")),
        dataset_dir=Path(values["dataset_dir"]) if values["dataset_dir"] else None,
        build=build,
        gradient_checkpointing=values["enable_gradient_checkpointing"],
        dft_alpha=parse_alpha(values["dft_alpha"]),
        objective_options=_objective_options(values["objective"], values, given),
        resume=_resume(values["resume_from_checkpoint"]),
        lora=lora_settings(values, given),
        training={name: given[name] for name in training_names if name in given},
        **{name: values[name] for name in (*own, *more)},
    )
