"""What the micro-batches of the current step were, kept until it is known that nothing went wrong. Used by `faults`.

Per micro-batch some 0-dim numbers, and for each token whether a gradient was not finite, stay on the device, where
nobody waits for them. They are read only for a step that is to be explained: then `suspects` names the rows.

Two gradients are looked at as they pass. The one of the last hidden states, where what is wrong in the forward pass,
or in the head, begins; and the one of the input embeddings, which whatever went wrong on the way back has reached.
With flash attention packed conversations do not see each other, and both point at the row at fault. The masks of sdpa
and eager are products with 0, which NaN passes: there the first points at all rows of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dft_common.schema import TOKENIZER_DIR
from dft_train.settings.checks import TOKENIZER_JSON

TEXT_CHARACTERS = 200
_TOKENS_READ = 400
"""Enough for that many characters in any language."""


class Micro:
    """One micro-batch on this rank. Tensors are on the device, and detached."""

    def __init__(self, packs: Sequence[int]) -> None:
        self.packs = tuple(packs)
        self.loss: Tensor | None = None
        self.ce_sum = torch.zeros(())
        self.live = torch.zeros(())
        self.top: Tensor | None = None
        """[tokens] bool: the gradient of the last hidden states is not finite. None where it was not seen."""
        self.bottom: Tensor | None = None
        """[tokens] bool: the same of the input embeddings."""

    def loss_value(self) -> float:
        return 0.0 if self.loss is None else float(self.loss)


class MicroCost(NamedTuple):
    """What a micro-batch cost, on the CPU."""

    packs: tuple[int, ...]
    ce_sum: float
    live: float

    @property
    def mean(self) -> float:
        return self.ce_sum / self.live if self.live else 0.0


class Suspect(NamedTuple):
    """A row that has part in what went wrong."""

    rank: int
    micro: int
    """Number of the micro-batch in its step, from 0."""
    pack: int
    row: int
    source: str
    id: str
    text: str


def _not_finite(gradient: Tensor) -> Tensor:
    """[tokens] bool from [1, tokens, hidden]."""
    return ~torch.isfinite(gradient.detach().reshape(-1, gradient.shape[-1]).sum(-1, dtype=torch.float32))


class StepTrace:
    """The micro-batches of the current step. Hooks the model's input embeddings and its head."""

    def __init__(self, embeddings: nn.Module | None, head: nn.Module) -> None:
        self.micros: list[Micro] = []
        self._current: Micro | None = None
        head.register_forward_pre_hook(self._see_hidden)
        if embeddings is not None:
            embeddings.register_forward_hook(self._see_embedded)

    def clear(self) -> None:
        self.micros = []

    def begin(self, packs: Sequence[int]) -> None:
        """The next micro-batch's forward pass is about to begin."""
        self._current = Micro(packs)
        self.micros.append(self._current)

    def end(self) -> None:
        """Its backward pass is done."""
        self._current = None

    def set_loss(self, loss: Tensor, ce_sum: Tensor, live: Tensor) -> None:
        if self._current is not None:
            self._current.loss, self._current.ce_sum, self._current.live = loss.detach(), ce_sum, live

    def costs(self) -> list[MicroCost]:
        """Of the step's micro-batches. Waits for the device, once."""
        if not self.micros:
            return []
        columns = [torch.stack([getattr(micro, name) for micro in self.micros]) for name in ("ce_sum", "live")]
        ce_sums, lives = torch.stack([column.float() for column in columns]).tolist()
        return [MicroCost(micro.packs, *cost) for micro, *cost in zip(self.micros, ce_sums, lives, strict=True)]

    def _see_hidden(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        micro, hidden = self._current, inputs[0] if inputs else None
        if micro is None or hidden is None or not hidden.requires_grad:
            return

        def look(gradient: Tensor) -> Tensor:
            micro.top = _not_finite(gradient)
            # A loss may be infinite and its gradient not (a logit of -inf): made alike, so that no rank misses it.
            return gradient if micro.loss is None else torch.where(torch.isfinite(micro.loss), gradient, torch.nan)

        hidden.register_hook(look)

    def _see_embedded(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        micro = self._current
        if micro is None or not output.requires_grad:
            return

        def look(gradient: Tensor) -> None:
            micro.bottom = _not_finite(gradient)

        output.register_hook(look)


class RowNames:
    """Names the rows of packs. `split`: a PackedSplit."""

    def __init__(self, split: Any, dataset_dir: Path, rank: int) -> None:
        self._split = split
        self._tokenizer = dataset_dir / TOKENIZER_DIR / TOKENIZER_JSON
        self._rank = rank

    def name(self, micro: int, packs: Sequence[int], tokens: np.ndarray | None = None) -> list[Suspect]:
        """The rows that hold a token of `tokens` ([tokens of the micro-batch] bool); without it, every row."""
        found, start = [], 0
        for pack in packs:
            for piece in self._split.index[pack]:
                end = start + piece.end - piece.start
                if tokens is None or tokens[start:end].any():
                    found.append(self._suspect(micro, pack, piece))
                start = end
        return found

    def _suspect(self, micro: int, pack: int, piece: Any) -> Suspect:
        row = self._split.reader.row(piece.row, piece.start, min(piece.end, piece.start + _TOKENS_READ))
        text = self._text(row.input_ids.tolist())
        return Suspect(self._rank, micro, pack, piece.row, row.source, row.id, text)

    def _text(self, ids: list[int]) -> str:
        if not self._tokenizer.is_file():
            return ""
        from tokenizers import Tokenizer

        text = Tokenizer.from_file(str(self._tokenizer)).decode(ids, skip_special_tokens=False)
        return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + "…"
