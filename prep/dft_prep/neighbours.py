"""What a tokenizer puts before a text, by what stands before it there. Learnt once a build.

Called by `encode`, which encodes a render piece by piece. Tokenizers that came from SentencePiece put a dummy space
before what they are given: right at the start, for some behind each control token too, but wrong behind other text,
where the model would have to write a space that the text does not have. There a piece is encoded behind a guard, a
short text that no token reaches across, whose ids are then taken away. Byte-level tokenizers need none of it.
"""

from __future__ import annotations

import msgspec

from dft_common.errors import SetupError
from dft_prep.encoders import ReferenceEncoder
from dft_prep.tokenizer_files import ControlToken

_GUARDS = ("\n", "\t", "|", "x", "0", ".")
_PROBES = ("Hello", " Hi", "the", "\n\nx", "日本", "é", "12", " ", "<b>", "_", "👍🏽", "a b", "x", ".")


class Neighbours(msgspec.Struct, frozen=True, kw_only=True):
    """How a piece of text is encoded, by what stands before it."""

    guard: str = ""
    guard_ids: tuple[int, ...] = ()
    behind_control: bool = False
    """Behind a control token too, no dummy space belongs there."""
    found_in_text: tuple[str, ...] = ()
    """Control tokens' texts that the model finds in plain text by itself: they are cut where they are typed."""

    def guards(self, after: str | None) -> bool:
        """Whether a piece is encoded behind the guard. after: `text`, `control`, or None at the start."""
        return bool(self.guard) and (after == "text" or (after == "control" and self.behind_control))


def learn_neighbours(encoder: ReferenceEncoder, control: tuple[ControlToken, ...]) -> Neighbours:
    """Raises SetupError for a tokenizer of which no guard is known."""
    found = tuple(token.text for token in control if token.id in encoder.encode([token.text])[0].tolist())
    alone = {text: _ids(encoder, text) for text in _PROBES}
    for guard in _GUARDS:
        guard_ids = _ids(encoder, guard)
        behind = {text: _ids(encoder, guard + text) for text in _PROBES}
        if not all(ids[: len(guard_ids)] == guard_ids for ids in behind.values()):
            continue
        behind = {text: ids[len(guard_ids) :] for text, ids in behind.items()}
        if behind == alone:
            return Neighbours(found_in_text=found)
        return Neighbours(
            guard=guard,
            guard_ids=tuple(guard_ids),
            behind_control=any(_behind_control(encoder, token, alone, behind) for token in control),
            found_in_text=found,
        )
    raise SetupError(
        "the tokenizer encodes a text otherwise behind every other text, so that no mask can be exact",
        remedy="use a tokenizer.json of the model's own publisher; what was found is worth reporting",
    )


def _behind_control(
    encoder: ReferenceEncoder, token: ControlToken, alone: dict[str, list[int]], behind: dict[str, list[int]]
) -> bool:
    """Whether the library encodes what follows this token as it does behind text."""
    texts = [text for text in _PROBES if text == text.strip()]
    whole = {text: encoder.encode_prompt(token.text + text)[1:] for text in texts}
    return all(whole[text] == behind[text] for text in texts) and any(whole[text] != alone[text] for text in texts)


def _ids(encoder: ReferenceEncoder, text: str) -> list[int]:
    return encoder.encode([text])[0].tolist()
