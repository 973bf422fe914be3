"""What the user asked for, resolved: flags -> options, tokenizer, template, and the recipe that the manifest keeps.

Called by `cli` and `build`. Everything that decides the dataset's bytes is in `Recipe.describe()`; what
only decides how they are made (workers, resume) is not.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from dft_common.build_flags import BUILD_FLAGS
from dft_common.errors import SetupError
from dft_common.fingerprint import hash_bytes, hash_object
from dft_common.flags import nearest
from dft_common.schema import TokenDtype
from dft_prep.codes.severities import Severities, parse_severities
from dft_prep.judge.decontaminate import Ngrams, load_ngrams
from dft_prep.template.render import CHATML, RenderOptions
from dft_prep.tokenizer_files import CHATML_TOKENS, TokenizerFiles, load_tokenizer

ENCODING_VERSION = 2
"""Raised when the same conversation would get other tokens or another mask: parts of older builds are then redone."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The flags of `dft-prep build`, by their names."""

    data_files: tuple[Any, ...]
    tokenizer: str
    output_dir: str
    chat_template: str | None = None
    add_chatml_tokens: bool = False
    max_length: int = 8192
    overlong: Literal["truncate", "split", "drop", "error"] = "truncate"
    packing: bool = True
    seed: int = 42
    train_on: Literal["all", "last"] = "all"
    unroll_turns: bool = False
    chat_template_kwargs: str | None = None
    unsupported_tools: Literal["text", "quarantine", "error"] = "text"
    special_tokens_in_text: Literal["encode", "quarantine", "error"] = "encode"
    template_date: str | None = None
    on_error: Literal["quarantine", "stop"] = "quarantine"
    error: tuple[str, ...] = ()
    warn: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    decontaminate: tuple[str, ...] = ()
    max_bad_fraction: float = 0.01
    max_bad_records: int = 10
    deduplicate: bool = True
    validation_split_percentage: float = 2.0
    preprocessing_num_workers: int | None = None
    encoder: Literal["auto", "fastokens", "tokenizers"] = "auto"
    shard_size: str = "512MB"
    resume: bool = True
    overwrite: bool = False
    token_dtype: TokenDtype = "int32"


def build_options(values: dict[str, Any]) -> BuildOptions:
    """Options from flags as parsed. Raises SetupError where a required one is missing."""
    for name in ("data_files", "tokenizer", "output_dir"):
        if not values.get(name):
            flag = next(flag for flag in BUILD_FLAGS if flag.name == name)
            raise SetupError(f"--{name} is missing", remedy=f"give --{name}: {flag.help}")
    return BuildOptions(**{**values, "data_files": tuple(values["data_files"])})


def parse_size(text: str, flag: str) -> int:
    """`512MB` -> 512,000,000 bytes."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or float(match[1]) <= 0:
        raise SetupError(f"--{flag} {text}: expected a size", remedy=f"write it as `--{flag} 512MB` or 2GB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def parse_date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(str(text))
    except ValueError:
        raise SetupError(
            f"--template_date {text}: expected a date as YYYY-MM-DD", remedy="write it as 2026-01-31"
        ) from None


def parse_template_kwargs(text: str | None) -> dict[str, Any]:
    """The variables of --chat_template_kwargs. Raises SetupError for one that the build itself gives."""
    given = json.loads(text) if text else {}
    if taken := sorted(given.keys() & {"messages", "tools", "add_generation_prompt"}):
        raise SetupError(
            f"--chat_template_kwargs: {taken[0]!r} is what each conversation gives the template itself",
            remedy="give only the template's other variables",
        )
    return given


class Template(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    origin: str
    """Where it is from: `tokenizer`, `chatml`, or the file's name."""

    @property
    def fingerprint(self) -> str:
        return hash_bytes(self.source.encode())


def choose_template(tokenizer: TokenizerFiles, wanted: str | None) -> Template:
    """The chat template to use. Raises SetupError, naming the flags, where the tokenizer has none that fits."""
    has_chatml = set(CHATML_TOKENS) <= {token.text for token in tokenizer.control_tokens()}
    if wanted is None and tokenizer.chat_template is not None:
        return Template(source=tokenizer.chat_template, origin="tokenizer")
    if wanted is None or wanted == "chatml":
        if has_chatml:
            return Template(source=CHATML, origin="chatml")
        missing = "this tokenizer has no chat template" if wanted is None else "--chat_template chatml"
        raise SetupError(
            f"{missing}, and lacks ChatML's control tokens ({' and '.join(CHATML_TOKENS)})",
            remedy="give the model's own template (--chat_template FILE.jinja), or --add_chatml_tokens to add them",
        )
    path = Path(wanted)
    try:
        return Template(source=path.read_text("utf-8"), origin=path.name)
    except (OSError, UnicodeDecodeError) as error:
        hint = nearest(wanted, ["chatml"]).replace("--", "")
        raise SetupError(
            f"--chat_template {wanted}: cannot be read{hint}: {error}", remedy="give a .jinja file, or `chatml`"
        ) from None


def prepare_tokenizer(name: str, chat_template: str | None, add_chatml_tokens: bool) -> tuple[TokenizerFiles, Template]:
    """The tokenizer (with ChatML's tokens where asked) and the template to use with it."""
    tokenizer = load_tokenizer(name)
    if add_chatml_tokens:
        tokenizer = tokenizer.with_chatml_tokens()
        chat_template = chat_template or "chatml"
    return tokenizer, choose_template(tokenizer, chat_template)


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what the dataset holds, but the source bytes."""

    options: BuildOptions
    tokenizer: TokenizerFiles
    template: Template
    date: datetime.date
    contamination: Ngrams
    """What must not be in the data: of the files of --decontaminate."""

    @property
    def uses_date(self) -> bool:
        """The template prints the date, so that it is part of the recipe."""
        return "strftime_now" in self.template.source

    @property
    def render_options(self) -> RenderOptions:
        options = self.options
        return RenderOptions(
            train_on=options.train_on,
            unroll_turns=options.unroll_turns,
            chat_template_kwargs=parse_template_kwargs(options.chat_template_kwargs),
            unsupported_tools=options.unsupported_tools,
            special_tokens_in_text=options.special_tokens_in_text,
        )

    @property
    def severities(self) -> Severities:
        return parse_severities(self.options.error, self.options.warn, self.options.ignore)

    @property
    def shard_bytes(self) -> int:
        return parse_size(self.options.shard_size, "shard_size")

    def describe(self, sources: list[dict[str, Any]]) -> dict[str, Any]:
        """The recipe as the manifest keeps it. sources: name, split and max_conversations of each."""
        options = self.options
        recipe: dict[str, Any] = {
            "sources": sources,
            "chat_template": self.template.fingerprint,
            "decontaminate": self.contamination.fingerprint if options.decontaminate else None,
            "severities": dict(sorted(self.severities.changed.items())),
            "train_on": options.train_on,
            "unroll_turns": options.unroll_turns,
            "chat_template_kwargs": parse_template_kwargs(options.chat_template_kwargs),
            "unsupported_tools": options.unsupported_tools,
            "special_tokens_in_text": options.special_tokens_in_text,
            "deduplicate": options.deduplicate,
            "validation_split_percentage": options.validation_split_percentage,
            "seed": options.seed,
            "token_dtype": options.token_dtype,
            "shard_size": self.shard_bytes,
            "max_length": options.max_length,
            "overlong": options.overlong,
            "packing": options.packing,
        }
        if self.uses_date:
            recipe["template_date"] = self.date.isoformat()
        return recipe

    def encoding_key(self) -> str:
        """Hash of all that decides a conversation's tokens and mask: half the name of a finished part."""
        return hash_object(
            {
                "version": ENCODING_VERSION,
                "tokenizer": self.tokenizer.fingerprint(),
                "named_tokens": self.tokenizer.named_tokens(),
                "template": self.template.fingerprint,
                "date": self.date.isoformat() if self.uses_date else None,
                "render": msgspec.structs.asdict(self.render_options),
                "token_dtype": self.options.token_dtype,
            }
        )


def check_vocabulary(tokenizer: TokenizerFiles, dtype: TokenDtype) -> None:
    if dtype == "uint16" and tokenizer.vocab_size() > 1 << 16:
        raise SetupError(
            f"--token_dtype uint16: the vocabulary has {tokenizer.vocab_size():,} tokens, uint16 holds 65,536",
            remedy="use --token_dtype int32",
        )


def make_recipe(options: BuildOptions, date: datetime.date) -> Recipe:
    """Resolve tokenizer and template. Raises SetupError."""
    tokenizer, template = prepare_tokenizer(options.tokenizer, options.chat_template, options.add_chatml_tokens)
    check_vocabulary(tokenizer, options.token_dtype)
    parse_size(options.shard_size, "shard_size")
    parse_severities(options.error, options.warn, options.ignore)
    return Recipe(
        options=options,
        tokenizer=tokenizer,
        template=template,
        date=date,
        contamination=load_ngrams(options.decontaminate),
    )
