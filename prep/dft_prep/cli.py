"""The command line of stage 1: `dft-prep build | validate | explain | preview | inspect | verify | pack`.

Flags are parsed here; each command's own module is imported only when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import Any

import click

from dft_common import __version__, build_flags, logs
from dft_common.errors import EXIT_BAD_DATA
from dft_common.flags import Flag, FlagCommand, run_command

# dft_common.schema.SPLITS, spelled out: importing it would import pyarrow, and make --help slow.
SPLIT = Flag(name="split", choices=("train", "validation"), default="train", help="Which split.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dft-prep")
def cli() -> None:
    """Turn messy multi-file chat data into a verified, memory-mapped, packed dataset.

    Exit codes: 0 done, 1 the data is bad, 2 the command line or environment is wrong, 130 interrupted.
    """


def _build(**values: Any) -> None:
    from dft_prep.pipeline.build import build
    from dft_prep.recipe import build_options

    click.echo(build(build_options(values)))


def _preview(n: int, format: str, tokens: bool, **values: Any) -> None:
    from dft_prep.recipe import build_options
    from dft_prep.show.preview import preview

    preview(build_options({**values, "output_dir": "."}), n, format, tokens=tokens)


def _inspect(dataset_dir: str, split: str, format: str, tokens: bool, **selection: Any) -> None:
    from dft_prep.show.inspection import Selection, inspect

    inspect(Path(dataset_dir), split, Selection(**selection), format, tokens=tokens)


def _verify(dataset_dir: str) -> int:
    from dft_prep.verify import verify

    problems = 0
    for problem in verify(Path(dataset_dir)):
        problems += 1
        click.echo(f"{dataset_dir}: {problem}")
    if problems:
        click.echo(f"{problems} problems: build the dataset again", err=True)
        return EXIT_BAD_DATA
    click.echo(f"{dataset_dir}: every checksum, count and invariant holds", err=True)
    return 0


def _pack(dataset_dir: str, **values: Any) -> None:
    from dft_common.manifest import read_manifest
    from dft_common.schema import PACKS_DIR
    from dft_prep.pipeline.report import describe_index
    from dft_prep.shards.pack import PackOptions, pack_split

    directory = Path(dataset_dir)
    manifest = read_manifest(directory)
    for name, value in values.items():
        values[name] = manifest.recipe[name] if value is None else value
    for split, info in manifest.splits.items():
        index = pack_split(directory / split, info, directory / PACKS_DIR, PackOptions(**values), manifest.fingerprint)
        click.echo(directory / PACKS_DIR / index.name)
        click.echo(f"{split}: {describe_index(index)}", err=True)


def _validate(files: tuple[str, ...], **values: Any) -> int:
    from dft_prep.validate.command import ValidateOptions, run_validate

    values["data_files"] += files
    if not values["data_files"]:
        raise click.UsageError("--data_files is missing: give the files to validate")
    return run_validate(ValidateOptions(**values))


def _explain(code: str | None) -> None:
    from dft_prep.codes.explain import explain

    click.echo(explain(code))


def _dataset_argument() -> click.Argument:
    return click.Argument(["dataset_dir"], metavar="OUT")


def _as_in_recipe(flag: Flag) -> Flag:
    """A pack flag whose default is what the dataset was built with."""
    return dataclasses.replace(flag, default=None, help=f"{flag.help} Default: as in the build.")


_VALIDATE_FLAGS = (
    build_flags.DATA_FILES,
    *build_flags.TOKENIZER_FLAGS,
    *build_flags.RENDER_FLAGS,
    Flag(name="max_length", kind="int", minimum=2, help="With a tokenizer: report conversations longer than this."),
    *build_flags.SEVERITY_FLAGS,
    build_flags.DECONTAMINATE,
    Flag(name="baseline", help="An earlier json, jsonl or sarif output: its findings are let through, new ones fail."),
    Flag(
        name="format",
        choices=("text", "json", "jsonl", "github", "sarif", "junit"),
        default="text",
        help="Of the findings.",
    ),
    Flag(name="output", help="File for the findings. Default: stdout."),
    Flag(name="max_errors", kind="int", default=100, minimum=0, help="Findings shown; after that only counts."),
    Flag(name="strict", kind="bool", default=False, help="A warning fails too."),
    build_flags.WORKERS,
)
_HOW_SHOWN = (
    "On a terminal trained text is green, context dim, control tokens bold. Without colours (not a terminal, or "
    "NO_COLOR) trained text stands in ⟦ ⟧ and control tokens in ‹ ›; a message's text that only looks like a control "
    "token has no such mark. ↵ is a newline; ⟦0.5▸ begins what is trained with weight 0.5; <0xE6> is a byte of a "
    "character that several tokens share. In the text itself such marks are escaped (\\u27e6)."
)
_SHOW_FLAGS = (
    Flag(name="format", choices=("text", "json"), default="text", help="Of the output."),
    Flag(
        name="tokens",
        kind="bool",
        default=False,
        help="Show the borders of the tokens, as │ (in JSON, `token_list` has id, text, trained).",
    ),
)
_INSPECT_FLAGS = (
    SPLIT,
    Flag(name="row", kind="int", minimum=0, help="Row number, from 0."),
    Flag(name="id", help="The rows of the conversation with this id."),
    Flag(name="source", help="The first row of this source."),
    Flag(name="pack", kind="int", minimum=0, help="The slices of this pack, from 0."),
    *_SHOW_FLAGS,
)
_PREVIEW_FLAGS = (
    build_flags.DATA_FILES,
    *build_flags.TOKENIZER_FLAGS,
    *build_flags.RENDER_FLAGS,
    Flag(name="n", kind="int", default=3, minimum=1, help="Conversations to show, from each source in turn."),
    *_SHOW_FLAGS,
)
_PACK_FLAGS = tuple(_as_in_recipe(flag) for flag in build_flags.PACK_FLAGS)

_COMMANDS = (
    FlagCommand("build", _build, build_flags.BUILD_FLAGS, short_help="Build a dataset from chat files.",
                help="Build a dataset: read, render, mask, encode, deduplicate, split, pack."),
    FlagCommand("validate", _validate, _VALIDATE_FLAGS, arguments=[click.Argument(["files"], nargs=-1)],
                short_help="Report every bad record.",
                help="Report every finding as file:line:column: CODE message. Exit 1 if there is an error. FILES are "
                "more data files, for programs that put them last; behind `--` they may begin with a dash."),
    FlagCommand("explain", _explain, (), arguments=[click.Argument(["code"], required=False)],
                short_help="Say what a finding's code means.",
                help="Say what CODE means, with an example and how to repair it; without CODE, list them all."),
    FlagCommand("preview", _preview, _PREVIEW_FLAGS, short_help="Show what would be trained.",
                help=f"Show the rendered text, trained tokens against context, before any build.\n\n{_HOW_SHOWN}"),
    FlagCommand("inspect", _inspect, _INSPECT_FLAGS, arguments=[_dataset_argument()],
                short_help="Show what a dataset holds.",
                help=f"Show a dataset's counts, and rows with what is trained in them.\n\n{_HOW_SHOWN}"),
    FlagCommand("verify", _verify, (), arguments=[_dataset_argument()], short_help="Check a dataset.",
                help="Check every checksum, count and invariant of a dataset. Exit 1 with what is wrong."),
    FlagCommand("pack", _pack, _PACK_FLAGS, arguments=[_dataset_argument()], short_help="Make another pack index.",
                help="Make another pack index, for another --max_length or seed. Tokenizes nothing."),
)  # fmt: skip
for _command in _COMMANDS:
    cli.add_command(_command)


def main() -> int:
    """Entry point of the console script."""
    if sys.stdout is None:
        # Started with a closed stdout (`>&-`): the exit code is what is asked for.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An output whose encoding lacks a character of the data, or a mark of `preview`, gets its escape, no crash.
        sys.stdout.reconfigure(errors="backslashreplace")
    logs.setup()
    return run_command(cli, "dft-prep")
