"""The command `dft-train`: a click group whose default command is `train`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from dft_common.flags import FlagCommand, run_command
from dft_train.ranks import slurm
from dft_train.train_command import choose_command
from dft_train.verify.flags import VERIFY_HELP, verify_flags


class _Group(click.Group):
    """A group whose default command is `train`; `train`'s flags depend on the ones that are used."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        slurm.adopt()
        with_name = args if args and not args[0].startswith("-") else ["train", *(args or ["--help"])]
        ctx.meta["arguments"] = with_name[1:]
        return super().parse_args(ctx, with_name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["train", *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "train":
            return choose_command(ctx.meta.get("arguments", []))
        return super().get_command(ctx, cmd_name)


def _verify(**values: Any) -> int:
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = {name: value for name, value in values.items() if context.get_parameter_source(name) is not default}
    from dft_train.verify.command import run

    return run(values, given)


group = _Group(
    "dft-train",
    help="Stage 2 of the DFT Toolkit: train on a prepared dataset.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
group.add_command(FlagCommand("verify", _verify, verify_flags(), help=VERIFY_HELP))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dft-train` and return the exit code. Called by the console script and by `python -m dft_train`."""
    return run_command(group, "dft-train", arguments)
