"""The flags of `dft-train verify`: its own, and those of `train` that change what a step computes. Called by `cli`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dft_common.flags import Flag
from dft_train.objectives import OPTIONS
from dft_train.settings.arguments import STATIC_FLAGS
from dft_train.settings.lora_flags import LORA_FLAGS

FORMATS = ("text", "json")
VERIFY_HELP = (
    "Run two optimizer steps of the model on a few packs of the dataset in several layouts (accumulation, ranks, ZeRO, "
    "offload, fused loss on and off), and compare losses, gradients and weights; and see that packed conversations do "
    "not see each other. Exit code 0 where all agree, 1 where something differs."
)

_REQUIRED = ("model_name_or_path", "dataset_dir")
_OTHER_HELP = {
    "model_name_or_path": "Directory or hub id of the model.",
    "dataset_dir": "A dataset that `dft-prep build` wrote.",
    "seed": "Of everything random. Default: 42.",
}
"""Of flags whose help for `train` speaks of more."""
_OF_A_STEP = (
    "max_length", "attn_implementation", "trust_remote_code", "enable_gradient_checkpointing", "objective", "dft_alpha",
    "router_aux_loss_coef", "learning_rate", "weight_decay", "max_grad_norm", "optim", "seed", "data_seed",
)  # fmt: skip
PASSED_ON = (*_REQUIRED, *_OF_A_STEP, *OPTIONS, *(flag.name for flag in LORA_FLAGS))
"""Flags of `train` that every layout gets as they are given."""

OWN_FLAGS = (
    Flag(name="deepspeed", help="A DeepSpeed configuration to compare too, in the precision of the others."),
    Flag(name="bf16", kind="bool", default=False, help="Compute in bfloat16, with wider tolerances. Default: float32."),
    Flag(
        name="verify_layers",
        kind="int",
        minimum=0,
        help="So many layers of the model's shape, with random weights; 0: the model itself. "
        "Default: the model itself where it is small enough, else 2.",
    ),
    Flag(
        name="verify_tokens",
        kind="int",
        minimum=8,
        help="Tokens that are taken of each pack. Default: 512, with an accelerator 4096.",
    ),
    Flag(name="format", choices=FORMATS, default="text", help="Of the result on stdout."),
)


def verify_flags() -> list[Flag]:
    """Every flag of the command."""
    passed = [
        dataclasses.replace(flag, required=flag.name in _REQUIRED, help=_OTHER_HELP.get(flag.name, flag.help))
        for flag in STATIC_FLAGS
        if flag.name in PASSED_ON
    ]
    names = {flag.name for flag in OWN_FLAGS}
    return [*(flag for flag in passed if flag.name not in names), *OWN_FLAGS]


def as_words(given: Mapping[str, Any]) -> list[str]:
    """The given flags of `train` as its command line, less the model and the dataset."""
    words: list[str] = []
    for name, value in given.items():
        if name in PASSED_ON and name not in _REQUIRED:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *map(str, values)]
    return words
