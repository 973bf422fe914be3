"""What a tokenizer puts before a text, by what stands before it there. Learnt once a build.

Called by `encode`, which encodes a render piece by piece. Tokenizers that came from SentencePiece put a dummy space
before what they are given: right at the start, for some behind each control token too, but wrong behind other text,
where the model would have to write a space that the text does not have. There a piece is encoded behind a guard, a
short text that no token reaches across, whose ids are then taken away. Byte-level tokenizers need none of it.
"""

from __future__ import annotations

import msgspec

from dft_common.errors import SetupError
from dft_prep.encode.encoders import ReferenceEncoder
from dft_prep.tokenizer_files import ControlToken

_GUARDS = ("\n", "\t", "|", "x", "0", ".")
_PROBES = ("Hello", " Hi", "the", "\n\nx", "日本", "é", "12", " ", "<b>", "_", "👍🏽", "a b", "x", ".")


class Guard(msgspec.Struct, frozen=True):
    text: str
    ids: tuple[int, ...]


class Neighbours(msgspec.Struct, frozen=True, kw_only=True):
    """How a piece of text is encoded, by what stands before it."""

    guards: tuple[Guard, ...] = ()
    """The first is the usual one; the others are for texts whose first token would reach across it."""
    behind_control: bool = False
    """Behind a control token too, no dummy space belongs there."""
    found_in_text: tuple[str, ...] = ()
    """Control tokens' texts that the model finds in plain text by itself: they are cut where they are typed."""

    def is_guarded(self, after: str | None) -> bool:
        """Whether a piece is encoded behind a guard. after: `text`, `control`, or None at the start."""
        return bool(self.guards) and (after == "text" or (after == "control" and self.behind_control))


def learn_neighbours(encoder: ReferenceEncoder, control: tuple[ControlToken, ...]) -> Neighbours:
    """Raises SetupError for a tokenizer of which no guard is known."""
    found = tuple(token.text for token in control if token.id in encoder.encode([token.text])[0].tolist())
    alone = {text: _ids(encoder, text) for text in _PROBES}
    guards: list[Guard] = []
    behind: dict[str, list[int]] = {}
    for text in _GUARDS:
        guard = Guard(text, tuple(_ids(encoder, text)))
        guarded = {probe: _behind(encoder, guard, probe) for probe in _PROBES}
        if not all(ids is None for ids in guarded.values()):
            guards.append(guard)
            behind = {probe: ids for probe, ids in guarded.items() if ids is not None} | behind
    if all(behind.get(text) == alone[text] for text in _PROBES):
        return Neighbours(found_in_text=found)
    if set(behind) != set(_PROBES):
        raise SetupError(
            "the tokenizer encodes a text otherwise behind every other text, so that no mask can be exact",
            remedy="use the tokenizer.json of the model's own publisher; what was found is worth reporting",
        )
    return Neighbours(
        guards=tuple(guards),
        behind_control=any(_behind_control(encoder, token, alone, behind) for token in control),
        found_in_text=found,
    )


def _behind(encoder: ReferenceEncoder, guard: Guard, text: str) -> list[int] | None:
    """The ids of `text` behind the guard; None where a token reaches across."""
    ids, count = _ids(encoder, guard.text + text), len(guard.ids)
    return ids[count:] if tuple(ids[:count]) == guard.ids else None


def _behind_control(
    encoder: ReferenceEncoder, token: ControlToken, alone: dict[str, list[int]], behind: dict[str, list[int]]
) -> bool:
    """Whether the library encodes what follows this token as it does behind text."""
    texts = [text for text in _PROBES if text == text.strip()]
    whole = {text: encoder.encode_prompt(token.text + text)[1:] for text in texts}
    return all(whole[text] == behind[text] for text in texts) and any(whole[text] != alone[text] for text in texts)


def _ids(encoder: ReferenceEncoder, text: str) -> list[int]:
    return encoder.encode([text])[0].tolist()
