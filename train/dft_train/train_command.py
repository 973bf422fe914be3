"""The command `dft-train train`: its flags, and a run from them. Parses first, imports torch after.

Called by `cli`, and by `verify.rank`, whose ranks train as a user would. Known flags are listed in `arguments`; where a
command line (or its --config file) has another, the fields of TrainingArguments are looked up, and a flag that is not
there either is an error that names the nearest one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from dft_common.errors import DftError, SetupError
from dft_common.flags import Flag, FlagCommand, load_config, nearest, run_command
from dft_train.ranks import launch
from dft_train.ranks import start as ranks
from dft_train.settings.arguments import STATIC_FLAGS, TRAINING_FLAGS, make_settings

TRAIN_HELP = (
    "Train a model on a dataset of `dft-prep build` with the DFT loss (arXiv 2508.05629). Runs alone, under torchrun "
    "(`torchrun --nproc_per_node N -m dft_train ...`) and under DeepSpeed (`deepspeed --num_gpus=N --module dft_train "
    "...`). Every field of transformers' TrainingArguments is a flag too: --help_all lists them. The other command is "
    "`dft-train verify`: does this model train alike in every layout?"
)
_ALWAYS = ("help", "help_all", "config")


def _train(**values: Any) -> int:
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = {name: value for name, value in values.items() if context.get_parameter_source(name) is not default}
    command = context.command
    assert isinstance(command, TrainCommand)
    try:
        settings = make_settings(values, given, command.training_names)
        if settings.num_gpus and not settings.dry_run and not ranks.started_here():
            return ranks.run_ranks(settings.num_gpus, context.meta["arguments"])
        from dft_train.trainer import run

        return run(settings)
    except DftError as error:
        if _speaks():
            raise
        return error.exit_code


def _speaks() -> bool:
    """Before the ranks meet, all of them find the same mistake: the first process of each node tells it, and another
    only where it alone has found one."""
    torch = sys.modules.get("torch")
    met = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return met or os.environ.get("LOCAL_RANK", "0") in ("0", "-1") or launch.alone_with_it()


def _show_all(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        click.echo(make_train_command(every_field=True).get_help(context))
        context.exit()


class TrainCommand(FlagCommand):
    """`dft-train train`, with the names of those flags that go to TrainingArguments."""

    def __init__(self, flags: Sequence[Flag], training_names: frozenset[str]) -> None:
        super().__init__("train", _train, flags, help=TRAIN_HELP)
        self.training_names = training_names
        show = click.Option(
            ["--help_all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_all,
            help="Show every field of TrainingArguments too, and exit.",
        )
        self.params.append(show)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)


def make_train_command(*, every_field: bool) -> TrainCommand:
    """The command with the flags of `--help`, or with every field of TrainingArguments (imports transformers)."""
    flags = {flag.name: flag for flag in STATIC_FLAGS}
    training = {flag.name for flag in TRAINING_FLAGS}
    if every_field:
        from dft_train.settings.training_fields import training_flags

        more = training_flags()
        training |= set(more)
        flags = {**more, **flags}
    return TrainCommand(list(flags.values()), frozenset(training))


def _flag_names(arguments: Sequence[str]) -> list[str]:
    """Names of the flags in `arguments`, those of a --config file included, with underscores."""
    names = [argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")]
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            path = value if equals else "".join(arguments[at + 1 : at + 2])
            if path:
                names += load_config(path)
    return [name for name in names if name]


def _spellings(command: FlagCommand) -> set[str]:
    return {spelling for flag in command.flags for spelling in flag.spellings} | set(_ALWAYS)


def choose_command(arguments: Sequence[str]) -> TrainCommand:
    """The smallest command that knows every flag of `arguments`. Raises SetupError for an unknown flag."""
    command = make_train_command(every_field=False)
    if set(_flag_names(arguments)) <= _spellings(command):
        return command
    command = make_train_command(every_field=True)
    on_line = {argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument[:2] == "--"}
    for name in sorted(on_line - _spellings(command) - {""}):
        raise SetupError(
            f"unknown flag --{name}{nearest(name, _spellings(command))}",
            remedy="`dft-train --help` lists the flags, `--help_all` those of TrainingArguments too",
        )
    return command


def train(arguments: Sequence[str]) -> int:
    """Train as `dft-train train` with `arguments` does, and return the exit code."""
    return run_command(choose_command(arguments), "dft-train train", arguments)
