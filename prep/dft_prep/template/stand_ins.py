"""Text stays text: what stands in a render for a control token's text that a message holds.

Called by `render`, for the few conversations that hold one. The text is swapped for characters of the same
number that the conversation does not hold, before rendering, and put back into its piece after; so the control
tokens that are found in the render are exactly those that the template wrote, and no text can pass for a stand-in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

PRIVATE = range(0xF0000, 0x10FFFE)
"""Unicode's private planes: no script, no white space, no case."""
_PRIVATE = re.compile(f"[{chr(PRIVATE[0])}-{chr(PRIVATE[-1])}]")


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(strings_in(item) for pair in value.items() for item in pair)
    elif isinstance(value, list):
        yield from chain.from_iterable(map(strings_in, value))


class StandIns:
    """The stand-ins of one conversation: by text, in the order in which they are looked for."""

    def __init__(self, by_text: dict[str, str]) -> None:
        self._stand_ins = by_text
        self._expression = re.compile("|".join(map(re.escape, by_text)) or r"(?!)")

    @classmethod
    def unlike(cls, value: Any, texts: Sequence[str]) -> StandIns:
        """For `texts` (longest first), of characters that do not occur in the JSON value `value`."""
        taken = set(_PRIVATE.findall("".join(strings_in(value))))
        free = (chr(code) for code in PRIVATE if chr(code) not in taken)
        filler = next(free)
        return cls({text: next(free) + filler * (len(text) - 1) for text in texts})

    def only(self, texts: Sequence[str]) -> StandIns:
        """The same, for these texts alone."""
        return StandIns({text: stand_in for text, stand_in in self._stand_ins.items() if text in texts})

    def swap(self, value: Any) -> Any:
        """A copy of a JSON value with every control token's text, in keys too, replaced by its stand-in."""
        if isinstance(value, str):
            return self._expression.sub(lambda match: self._stand_ins[match[0]], value)
        if isinstance(value, dict):
            return {self.swap(key): self.swap(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.swap(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """`text` with the control tokens' texts put back."""
        for original, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, original)
        return text


class ControlTexts:
    """The control tokens' texts, and whether a message holds one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self._expression = re.compile("|".join(map(re.escape, texts))) if texts else None
        # A cheap test before the expression: every control token begins with one of a few short prefixes.
        self._prefixes = tuple(sorted({text[:2] for text in texts}))

    def found_in(self, value: Any) -> bool:
        """Whether a string of this JSON value, a key too, holds one."""
        if isinstance(value, str):
            for prefix in self._prefixes:
                if prefix in value:
                    return self._expression is not None and self._expression.search(value) is not None
            return False
        if isinstance(value, dict):
            return any(self.found_in(key) or self.found_in(item) for key, item in value.items())
        return isinstance(value, list) and any(map(self.found_in, value))

    def positions(self, text: str) -> list[tuple[int, int]]:
        """Characters [start, end) of each."""
        return [match.span() for match in self._expression.finditer(text)] if self._expression else []
