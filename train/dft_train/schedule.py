"""`--dft_alpha` over the run: a number, or a way from one to another. No torch. Parsed by `arguments`, read by `loop`.

    0.7                  constant
    0:0.7                linear, from the first optimizer step to the last
    cosine:0:0.7         half a cosine, flat at both ends
    0:0.7@0.1            the end is reached after a tenth of the steps, and kept

The value is a function of the step and the number of steps alone, so a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math

from dft_common.errors import SetupError

_SHAPES = {"linear": lambda part: part, "cosine": lambda part: (1.0 - math.cos(math.pi * part)) / 2.0}
"""Name -> the part of the way that is behind, from the part of the time that is."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AlphaSchedule:
    """dft_alpha by optimizer step, each value 0 to 1."""

    start: float
    end: float
    shape: str = "linear"
    reached: float = 1.0
    """The part of the run's steps after which `end` is reached: above 0, at most 1."""

    def at(self, step: int, max_steps: int) -> float:
        """The value for the optimizer step that `step` others come before, of `max_steps`.

        `start` for the first step and `end` for the last; `end` too after it, and where there are no steps at all.
        """
        last = self.reached * (max_steps - 1)
        if self.start == self.end or step >= last:
            return self.end
        return self.start + (self.end - self.start) * _SHAPES[self.shape](step / last)

    def __str__(self) -> str:
        """As `parse_alpha` reads it."""
        if self.start == self.end:
            return f"{self.end:.12g}"
        shape = "" if self.shape == "linear" else f"{self.shape}:"
        reached = "" if self.reached == 1.0 else f"@{self.reached:.12g}"
        return f"{shape}{self.start:.12g}:{self.end:.12g}{reached}"


def _wrong(text: str, found: str) -> SetupError:
    return SetupError(
        f"--dft_alpha {text}: {found}",
        remedy="give a number from 0 to 1, or a schedule as `0:0.7`, `cosine:0:0.7` or `0:0.7@0.1` "
        "(the end is reached after a tenth of the steps)",
    )


def _number(text: str, part: str, what: str) -> float:
    try:
        value = float(part)
    except ValueError:
        raise _wrong(text, f"{part!r} is not a number") from None
    if not 0.0 <= value <= 1.0:
        raise _wrong(text, f"{what} is {part}, expected 0 to 1")
    return value


def parse_alpha(text: str) -> AlphaSchedule:
    """The schedule that `text` spells. Raises SetupError where it spells none."""
    values, at, fraction = text.strip().partition("@")
    *shape, first = values.split(":", 1) if values.partition(":")[0] in _SHAPES else (values,)
    start, *end = first.split(":")
    if len(end) > 1 or (not end and (shape or at)):
        raise _wrong(text, "a schedule has two values")
    reached = _number(text, fraction, "the part of the run") if at else 1.0
    if not reached:
        raise _wrong(text, "the part of the run is 0, expected more")
    first_value = _number(text, start, "alpha")
    return AlphaSchedule(
        start=first_value,
        end=_number(text, end[0], "alpha") if end else first_value,
        shape=shape[0] if shape else "linear",
        reached=reached,
    )
