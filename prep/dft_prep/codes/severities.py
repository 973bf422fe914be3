"""How grave each finding is: as its code says, unless the recipe sets it otherwise.

Made from `--error CODE... --warn CODE... --ignore CODE...` by `recipe` and `validate.command`; asked by `judge` and
`work` for every finding, so that a validation and a build never differ.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

import msgspec

from dft_common.errors import SetupError
from dft_prep.codes.table import CODES, Severity


class Severities(msgspec.Struct, frozen=True):
    """What the recipe sets, by code; every other code is as `CODES` has it."""

    changed: dict[str, Severity | Literal["ignore"]] = {}

    def of(self, code: str) -> Severity | Literal["ignore"]:
        """`ignore`: not reported, not counted."""
        return self.changed.get(code) or CODES[code].severity


AS_CODED = Severities()


def parse_severities(error: Sequence[str], warn: Sequence[str], ignore: Sequence[str]) -> Severities:
    """From the codes that each flag lists. Raises SetupError for an unknown one, or one that may not be so."""
    changed: dict[str, Severity | Literal["ignore"]] = {}
    wished: tuple[tuple[str, Severity | Literal["ignore"], Sequence[str]], ...] = (
        ("error", "error", error),
        ("warn", "warning", warn),
        ("ignore", "ignore", ignore),
    )
    for flag, severity, codes in wished:
        for code in codes:
            if code not in CODES:
                close = difflib.get_close_matches(code, CODES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "`dft-prep explain` lists every code"
                raise SetupError(f"--{flag} {code}: there is no such code", remedy=hint)
            if code in changed:
                raise SetupError(f"--{flag} {code}: another flag sets it too", remedy="keep one of them")
            if not CODES[code].may_be(severity):
                why, remedy = _why_not(code)
                raise SetupError(f"--{flag} {code}: it {why}", remedy=remedy)
            changed[code] = severity
    return Severities(changed)


def _why_not(code: str) -> tuple[str, str]:
    """(why a code may not have a severity, what to do)"""
    if CODES[code].severity == "error":
        return "stays an error: nothing can be built from what it is about", "take the flag away, and repair the data"
    return "leaves no record out, so that it cannot be an error", "use --warn with --strict"
