"""Flags as both commands spell them, on top of click.

click has no option that takes several values up to the next flag, and no boolean that takes a value
or none; so the command line is expanded first (`expand_argv`) into what click parses. A flag may be
spelled with hyphens or underscores. `--config FILE.yaml` gives defaults whose keys are the flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from dft_common.errors import EXIT_INTERRUPTED, DftError, SetupError, report_error

TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")

Kind = Literal["str", "int", "float", "bool", "list", "json"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag: `--name`, its kind, default, and the text of its help."""

    name: str
    kind: Kind = "str"
    default: Any = None
    help: str = ""
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    required: bool = False
    metavar: str | None = None
    """What the help calls its value. Default: by its kind."""

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


class _SourceType(click.ParamType):
    """A data file: text on the command line, text or a mapping in a config file."""

    name = "PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, dict) else str(value)


class _JsonObjectType(click.ParamType):
    """A JSON object: its text on the command line, text or a mapping in a config file. The value is its text."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parsed = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"not JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"found {value}, expected a JSON object", param, ctx)
        return json.dumps(parsed, ensure_ascii=False, sort_keys=True)


def _click_type(flag: Flag) -> click.ParamType:
    if flag.choices:
        return click.Choice(flag.choices)
    unbounded = flag.minimum is None and flag.maximum is None
    if flag.kind in ("int", "float") and unbounded:
        return click.INT if flag.kind == "int" else click.FLOAT
    if flag.kind == "int":
        low, high = (int(bound) if bound is not None else None for bound in (flag.minimum, flag.maximum))
        return click.IntRange(min=low, max=high)
    if flag.kind == "float":
        return click.FloatRange(min=flag.minimum, max=flag.maximum)
    if flag.kind == "bool":
        return click.BOOL
    if flag.kind == "json":
        return _JsonObjectType()
    return _SourceType() if flag.kind == "list" else click.STRING


def click_option(flag: Flag) -> click.Option:
    """`flag` as a click option."""
    names = [f"--{spelling}" if len(spelling) > 1 else f"-{spelling}" for spelling in flag.spellings]
    # click takes a default of None for a value that is there, and then asks for nothing.
    default = {} if flag.required else {"default": flag.default}
    return click.Option(
        [*names, flag.name],
        type=_click_type(flag),
        **default,
        multiple=flag.kind == "list",
        required=flag.required,
        metavar=flag.metavar,
        show_default=flag.default not in (None, ()),
        help=flag.help,
    )


def _boolean_word(text: str) -> bool:
    return text.lower() in TRUE_WORDS + FALSE_WORDS


def _take_values(arguments: Sequence[str], at: int) -> int:
    """Index of the first argument from `at` on that begins with a dash."""
    while at < len(arguments) and not (arguments[at].startswith("-") and arguments[at] != "-"):
        at += 1
    return at


def expand_argv(arguments: Sequence[str], flags: Iterable[Flag]) -> list[str]:
    """`arguments` in the form that click parses: one value a list flag, a value for every boolean.

    `["--data-files", "a", "b", "--bf16"]` becomes `["--data_files=a", "--data_files=b", "--bf16=True"]`.
    Flags that are not in `flags` are kept as they are (with underscores), for the caller to judge.
    """
    known = {spelling: flag for flag in flags for spelling in flag.spellings}
    out: list[str] = []
    at = 0
    while at < len(arguments):
        argument = arguments[at]
        at += 1
        if argument == "--":
            return [*out, argument, *arguments[at:]]
        if not argument.startswith("--"):
            out.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        flag = known.get(name)
        if flag is None or equals:
            out.append(f"--{name}{equals}{value}")
        elif flag.kind == "list":
            end = _take_values(arguments, at)
            if end == at:
                raise SetupError(f"--{name} needs at least one value", remedy=f"write `--{name} VALUE ...`")
            out += [f"--{name}={item}" for item in arguments[at:end]]
            at = end
        elif flag.kind == "bool":
            given = at < len(arguments) and _boolean_word(arguments[at])
            out.append(f"--{name}={arguments[at] if given else 'True'}")
            at += given
        elif at < len(arguments):
            out.append(f"--{name}={arguments[at]}")
            at += 1
        else:
            raise SetupError(f"--{name} needs a value", remedy=f"write `--{name} VALUE`")
    return out


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean --x?)` for the known flag that `name` is closest to, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean --{close[0]}?)" if close else ""


def load_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, its keys spelled with underscores."""
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise SetupError(f"--config {path}: {error.strerror}", remedy="give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SetupError(f"--config {path}: not YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SetupError(
            f"--config {path}: found {type(value).__name__} at the top level, expected a mapping",
            remedy="write one `flag: value` a line",
        )
    return {str(key).lstrip("-").replace("-", "_"): item for key, item in value.items()}


def config_defaults(path: str, flags: Sequence[Flag]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(defaults for the flags of this command, keys of the file that are not its flags)."""
    names = {spelling: flag for flag in flags for spelling in flag.spellings}
    own: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for key, value in load_config(path).items():
        flag = names.get(key)
        if flag is None:
            others[key] = value
        elif flag.kind == "list" and not isinstance(value, list):
            own[flag.name] = [value]
        else:
            own[flag.name] = value
    return own, others


class FlagCommand(click.Command):
    """A click command made from `Flag`s. Keys of a config file that are not its flags belong to the other
    command; one that is nearly a flag of this one is an error."""

    def __init__(self, name: str, callback: Callable[..., Any], flags: Sequence[Flag], **settings: Any) -> None:
        self.flags = tuple(flags)
        config = click.Option(
            ["--config"],
            help="YAML file whose keys are flags; flags on the command line win.",
            is_eager=True,
            expose_value=False,
            callback=self._load_config,
        )
        arguments = settings.pop("arguments", [])
        options = [click_option(flag) for flag in flags]
        super().__init__(name, callback=callback, params=[*arguments, *options, config], **settings)

    def _load_config(self, ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is None:
            return
        own, others = config_defaults(value, self.flags)
        known = [flag.name for flag in self.flags]
        for key in others:
            if close := difflib.get_close_matches(key, known, n=1, cutoff=0.85):
                raise SetupError(f"--config {value}: unknown key {key!r}", remedy=f"did you mean {close[0]!r}?")
        ctx.default_map = {**(ctx.default_map or {}), **own}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        config = Flag(name="config")
        return super().parse_args(ctx, expand_argv(args, [*self.flags, config]))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output (head, less) went away; that is its right, and click would exit 1 for it.
            let_go_of_stdout()
            return 0


def run_command(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a click command and return the exit code: 0, 1 bad data, 2 bad usage, 130 interrupted."""
    try:
        result = command.main(list(sys.argv[1:] if arguments is None else arguments), name, standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # what is lost at the interpreter's end is lost without an exit code of ours
    except DftError as error:
        return report_error(error)
    except click.ClickException as error:
        error.show()
        return error.exit_code if error.exit_code != 1 else 2
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        let_go_of_stdout()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        let_go_of_stdout()
        about = f"{error.filename}: " if error.filename else ""
        return report_error(SetupError(f"{about}the disk is full", remedy="free some space where the output goes"))
    return result if isinstance(result, int) else 0


def let_go_of_stdout() -> None:
    """What it still holds would fail once more at the interpreter's end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_arguments(values: Mapping[str, Any]) -> list[str]:
    """Flags and values as a command line that gives them again: how `dft-train` calls `dft-prep build`."""
    out: list[str] = []
    for name, value in values.items():
        if isinstance(value, list | tuple):
            out += [f"--{name}", *(str(item) for item in value)]
        elif value is not None:
            out.append(f"--{name}={value}")
    return out
