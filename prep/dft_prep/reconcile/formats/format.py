"""What a format is: how its records are told, which of their fields are used, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from dft_prep.reconcile.formats.turns import Turns


class Format(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    fields: dict[str, str]
    """Path of each field that is used -> what it becomes in the canonical conversation."""
    holds: tuple[tuple[str, ...], ...]
    """Where other formats fit too, this one counts only if a field of each of these groups holds something."""
    evidence: Callable[[Mapping[str, Any]], bool]
    """Whether a record has what tells this format."""
    convert: Callable[[Mapping[str, Any], Turns], None]
    """Adds the messages of a record. Raises RecordError."""
    tool: Callable[[Any], Any] | None = None
    """What a declared tool becomes, where it is not as chat templates expect it."""
