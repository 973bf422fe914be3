"""Conversations -> token ids, assistant masks, loss weights: piece by piece, with the ids that inference feeds.

Called by `work` for each batch of a work unit. The rendered text is cut at the control tokens that the
template wrote and at the borders of the trained spans; each piece is encoded on its own, control tokens are
put in by id. So the prompt's ids are exactly inference's, no token straddles prompt and reply, and the mask
is the pieces' lengths. What a tokenizer puts before a text, by what stands before it, is learnt (`neighbours`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
import numpy as np

from dft_common.errors import DataError
from dft_prep.encode.encoders import Encoder, EncoderMismatch, ReferenceEncoder, same_ids
from dft_prep.encode.neighbours import Neighbours, learn_neighbours
from dft_prep.template.render import Rendered, Renderer, TrainedSpan
from dft_prep.tokenizer_files import ControlToken, TokenizerFiles

CHECKED_ONE_IN = 1000
_CACHED_PIECE = 24
"""Pieces up to this many characters (`user\\n`, `\\n`) come again and again: their ids are kept."""
_CACHE_LIMIT = 1 << 16

# What the tokenizers library takes for white space beside a control token (Rust's char::is_whitespace).
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LEFT_SPACE = re.compile(f"^[{_SPACE}]+")
_RIGHT_SPACE = re.compile(f"[{_SPACE}]+$")


class Piece(msgspec.Struct, frozen=True):
    """A run of text or one control token, with the weight that its tokens are trained with (0: context)."""

    text: str
    token: int | None
    weight: float
    guarded: bool = False
    """Encoded behind the guard of `Neighbours`."""


class EncodedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of token ids, flat."""

    input_ids: np.ndarray
    """[tokens] uint32."""
    weights: np.ndarray
    """[tokens] float32: 0 is context, else what the token's loss counts."""
    offsets: np.ndarray
    """[rows + 1] int64."""


def cut(
    rendered: Rendered, renderer: Renderer, control: dict[str, ControlToken], neighbours: Neighbours
) -> list[Piece]:
    """`rendered` as pieces, in order. White space that a control token swallows is gone from its neighbours.

    But not from a reply: the token stands in the prompt, and what the model writes after it is its own.
    """
    text = rendered.text
    # Where the weight changes, and to what; the last edge is behind the text.
    edges = [edge for start, end, weight in rendered.spans for edge in ((start, weight), (end, 0.0))]
    edges.append((len(text) + 1, 0.0))
    pieces: list[Piece] = []
    at = next_edge = 0
    weight = 0.0
    strip_left = False
    after: str | None = None
    for start, end in [*renderer.control.positions(text), (len(text), len(text))]:
        token = control.get(text[start:end])
        while at < start or edges[next_edge][0] <= start:
            position, following = edges[next_edge]
            stop = min(position, start)
            run = text[at:stop]
            if strip_left and at < stop:
                run, strip_left = _LEFT_SPACE.sub("", run), False
            if stop == start and token is not None and token.strips_left:
                run = _RIGHT_SPACE.sub("", run)
            for part in _typed(rendered, run, neighbours) if run else ():
                pieces.append(Piece(part, None, weight, neighbours.is_guarded(after)))
                after = "text"
            at = stop
            if position <= start:
                weight, next_edge = following, next_edge + 1
                strip_left = strip_left and weight == 0
        if token is not None:
            pieces.append(Piece(token.text, token.id, weight))
            strip_left, after = token.strips_right, "control"
        at = end
    return pieces


def _typed(rendered: Rendered, run: str, neighbours: Neighbours) -> list[str]:
    """A run with its stand-ins replaced, cut inside what the model would take for a control token."""
    if rendered.stand_ins is None:
        return [run]
    parts = [rendered.restore(run)]
    for text in neighbours.found_in_text:
        parts = [
            part for whole in parts for part in re.split(f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})", whole)
        ]
    return parts


class BatchEncoder:
    """Encodes batches of rendered conversations with one tokenizer."""

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: TokenizerFiles,
        encoder: Encoder,
        reference: ReferenceEncoder,
    ) -> None:
        self.renderer = renderer
        self.encoder = encoder
        self.reference = reference
        self.control = {token.text: token for token in tokenizer.control_tokens()}
        self.neighbours = learn_neighbours(reference, tokenizer.control_tokens())
        self._cache: dict[str, np.ndarray] = {}
        self._control_ids = {token.id: np.array([token.id], np.uint32) for token in self.control.values()}

    def encode(self, batch: Sequence[Rendered]) -> EncodedBatch:
        """Ids and weights of every conversation of `batch`, in order."""
        return self.encode_pieces([self.cut(rendered) for rendered in batch])

    def cut(self, rendered: Rendered) -> list[Piece]:
        return cut(rendered, self.renderer, self.control, self.neighbours)

    def _key(self, text: str, guarded: bool) -> str:
        """What is given to the tokenizer for a piece."""
        return self.neighbours.guards[0].text + text if guarded else text

    def encode_pieces(self, rows: Sequence[list[Piece]]) -> EncodedBatch:
        new = [
            self._key(piece.text, piece.guarded)
            for pieces in rows
            for piece in pieces
            if piece.token is None and self._key(piece.text, piece.guarded) not in self._cache
        ]
        ids, offsets = self.encoder.encode(new)
        bounds = offsets.tolist()
        parts: list[np.ndarray] = []
        weights: list[float] = []
        counts: list[int] = []
        at = 0
        fresh: dict[str, np.ndarray] = {}
        for pieces in rows:
            counts.append(len(pieces))
            for text, token, weight, guarded in map(msgspec.structs.astuple, pieces):
                weights.append(weight)
                if token is not None:
                    parts.append(self._control_ids[token])
                    continue
                key = self._key(text, guarded)
                known = self._cache.get(key)
                if known is None:
                    known = ids[bounds[at] : bounds[at + 1]]
                    at += 1
                    if len(key) <= _CACHED_PIECE:
                        fresh[key] = known
                parts.append(self._without_guard(known, text) if guarded else known)
        self._remember(fresh)
        return _assemble(parts, weights, counts)

    def _without_guard(self, ids: np.ndarray, text: str) -> np.ndarray:
        """ids: of the first guard and `text`. Where a token reaches across that guard, another one is taken."""
        for number, guard in enumerate(self.neighbours.guards):
            if number:
                ids = self.encoder.encode([guard.text + text])[0]
            if tuple(ids[: len(guard.ids)].tolist()) == guard.ids:
                return ids[len(guard.ids) :]
        raise DataError(
            f"a token reaches across the border before {text[:40]!r}, so that its mask cannot be exact",
            remedy="report it with the tokenizer's name; no byte-level tokenizer has such a border",
        )

    def _remember(self, fresh: dict[str, np.ndarray]) -> None:
        if len(self._cache) + len(fresh) > _CACHE_LIMIT:
            self._cache.clear()
        self._cache.update((text, ids.copy()) for text, ids in fresh.items())

    def check(self, rendered: Rendered) -> None:
        """Raise EncoderMismatch unless the engine's ids for `rendered` are those of `tokenizers`."""
        texts = [self._key(piece.text, piece.guarded) for piece in self.cut(rendered) if piece.token is None]
        if not same_ids(self.encoder.encode(texts), self.reference.encode(texts)):
            raise EncoderMismatch(self.encoder.name)

    def prompt_ids(self, rendered: Rendered, end: int) -> list[int]:
        """Ids, piece by piece, of the first `end` characters: to compare with those of the whole."""
        head = Rendered(
            text=rendered.text[:end],
            spans=(TrainedSpan(end, end, 1.0),),
            notes=(),
            stand_ins=rendered.stand_ins,
        )
        return self.encode_pieces([self.cut(head)]).input_ids.tolist()


def _assemble(parts: list[np.ndarray], weights: list[float], counts: list[int]) -> EncodedBatch:
    lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return EncodedBatch(
        input_ids=np.concatenate(parts) if parts else np.zeros(0, np.uint32),
        weights=np.repeat(np.asarray(weights, np.float32), lengths),
        offsets=ends[np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])],
    )
