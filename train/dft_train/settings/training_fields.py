"""Every field of transformers' `TrainingArguments` as a flag. Imported by `cli` only when a command line uses
a flag that `arguments` does not list, or for `--help_all`: it costs the import of transformers."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from transformers import TrainingArguments

from dft_common.flags import Flag, Kind
from dft_train.settings.arguments import OWN_FLAGS, STATIC_FLAGS

_OURS = frozenset(flag.name for flag in OWN_FLAGS)


def _parts(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(part for inner in typing.get_args(annotation) for part in _parts(inner))
    return (annotation,)


def _kind(annotation: Any) -> Kind:
    """The widest of the field's types that a command line can spell; a dict is given as JSON text."""
    parts = _parts(annotation)
    if any(typing.get_origin(part) is list for part in parts) and dict not in parts:
        return "list"
    for kind, name in ((str, "str"), (float, "float"), (int, "int"), (bool, "bool")):
        if kind in parts:
            return typing.cast(Kind, name)
    return "str"


def _default(field: dataclasses.Field) -> str:
    if field.default in (dataclasses.MISSING, None):
        return ""
    return f" Default: {getattr(field.default, 'value', field.default)}."


def training_flags() -> dict[str, Flag]:
    """Flags for all of TrainingArguments' fields but those that are ours, by name."""
    hints = typing.get_type_hints(TrainingArguments)
    listed = {flag.name: flag for flag in STATIC_FLAGS}
    flags = {}
    for field in dataclasses.fields(TrainingArguments):
        if field.name in _OURS or not field.init:
            continue
        text = " ".join(str(field.metadata.get("help", "")).split())
        made = Flag(name=field.name, kind=_kind(hints[field.name]), help=text + _default(field))
        flags[field.name] = listed.get(field.name, made)
    return flags
