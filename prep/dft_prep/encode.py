"""Conversations -> token ids, assistant masks, loss weights: piece by piece, with the ids that inference feeds.

Called by `work` for each batch of a work unit. The rendered text is cut at the control tokens that the
template wrote and at the borders of the trained spans; each piece is encoded on its own, control tokens are
put in by id. So the prompt's ids are exactly inference's, no token straddles prompt and reply, and the mask
is the pieces' lengths. Where a tokenizer makes the pieces of a prompt differ from the whole (`pieces_differ`),
the whole text is encoded instead, and offsets place the mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
import numpy as np

from dft_prep.encoders import Encoder, EncoderMismatch, ReferenceEncoder, same_ids
from dft_prep.render import Rendered, Renderer, TrainedSpan
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


class EncodedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of token ids, flat."""

    input_ids: np.ndarray
    """[tokens] uint32."""
    weights: np.ndarray
    """[tokens] float32: 0 is context, else what the token's loss counts."""
    offsets: np.ndarray
    """[rows + 1] int64."""


def cut(rendered: Rendered, renderer: Renderer, control: dict[str, ControlToken]) -> list[Piece]:
    """`rendered` as pieces, in order. White space that a control token swallows is gone from its neighbours."""
    text = rendered.text
    # Where the weight changes, and to what; the last edge is behind the text.
    edges = [edge for start, end, weight in rendered.spans for edge in ((start, weight), (end, 0.0))]
    edges.append((len(text) + 1, 0.0))
    pieces: list[Piece] = []
    at = next_edge = 0
    weight = 0.0
    strip_left = False
    for start, end in [*renderer.control.positions(text), (len(text), len(text))]:
        token = control.get(text[start:end])
        while at < start or edges[next_edge][0] <= start:
            position, after = edges[next_edge]
            stop = min(position, start)
            run = text[at:stop]
            if strip_left and at < stop:
                run, strip_left = _LEFT_SPACE.sub("", run), False
            if stop == start and token is not None and token.strips_left:
                run = _RIGHT_SPACE.sub("", run)
            if run:
                pieces.append(Piece(rendered.restore(run), None, weight))
            at = stop
            if position <= start:
                weight, next_edge = after, next_edge + 1
        if token is not None:
            pieces.append(Piece(token.text, token.id, weight))
            strip_left = token.strips_right
        at = end
    return pieces


class BatchEncoder:
    """Encodes batches of rendered conversations with one tokenizer."""

    def __init__(
        self,
        renderer: Renderer,
        tokenizer: TokenizerFiles,
        encoder: Encoder,
        reference: ReferenceEncoder,
        *,
        whole: bool = False,
    ) -> None:
        self.renderer = renderer
        self.encoder = encoder
        self.reference = reference
        self.whole = whole
        self.control = {token.text: token for token in tokenizer.control_tokens()}
        self._cache: dict[str, np.ndarray] = {}
        self._control_ids = {token.id: np.array([token.id], np.uint32) for token in self.control.values()}

    def encode(self, batch: Sequence[Rendered]) -> EncodedBatch:
        """Ids and weights of every conversation of `batch`, in order."""
        if self.whole:
            return _join([self._encode_whole(rendered) for rendered in batch])
        return self.encode_pieces([cut(rendered, self.renderer, self.control) for rendered in batch])

    def encode_pieces(self, rows: Sequence[list[Piece]]) -> EncodedBatch:
        new = [
            piece.text for pieces in rows for piece in pieces if piece.token is None and piece.text not in self._cache
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
            for text, token, weight in map(msgspec.structs.astuple, pieces):
                weights.append(weight)
                if token is not None:
                    parts.append(self._control_ids[token])
                    continue
                known = self._cache.get(text)
                if known is None:
                    known = ids[bounds[at] : bounds[at + 1]]
                    at += 1
                    if len(text) <= _CACHED_PIECE:
                        fresh[text] = known
                parts.append(known)
        self._remember(fresh)
        return _assemble(parts, weights, counts)

    def _remember(self, fresh: dict[str, np.ndarray]) -> None:
        if len(self._cache) + len(fresh) > _CACHE_LIMIT:
            self._cache.clear()
        self._cache.update((text, ids.copy()) for text, ids in fresh.items())

    def check(self, rendered: Rendered) -> None:
        """Raise EncoderMismatch unless the engine's ids for `rendered` are those of `tokenizers`."""
        texts = [piece.text for piece in cut(rendered, self.renderer, self.control) if piece.token is None]
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
        return self.encode_pieces([cut(head, self.renderer, self.control)]).input_ids.tolist()

    def _encode_whole(self, rendered: Rendered) -> EncodedBatch:
        if rendered.stand_ins is not None:
            # Only pieces can keep a control token's text apart from the token.
            return self.encode_pieces([cut(rendered, self.renderer, self.control)])
        ids, starts = self.reference.encode_with_offsets(rendered.text)
        weights = np.zeros(len(ids), np.float32)
        for start, end, weight in rendered.spans:
            weights[(starts >= start) & (starts < end)] = weight
        return EncodedBatch(input_ids=ids, weights=weights, offsets=np.array([0, len(ids)], np.int64))


def _assemble(parts: list[np.ndarray], weights: list[float], counts: list[int]) -> EncodedBatch:
    lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return EncodedBatch(
        input_ids=np.concatenate(parts) if parts else np.zeros(0, np.uint32),
        weights=np.repeat(np.asarray(weights, np.float32), lengths),
        offsets=ends[np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])],
    )


def _join(batches: Sequence[EncodedBatch]) -> EncodedBatch:
    lengths = [len(batch.input_ids) for batch in batches]
    return EncodedBatch(
        input_ids=np.concatenate([np.zeros(0, np.uint32), *(batch.input_ids for batch in batches)]),
        weights=np.concatenate([np.zeros(0, np.float32), *(batch.weights for batch in batches)]),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
    )
