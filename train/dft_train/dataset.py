"""A built dataset as the trainer sees it: memory-mapped rows, a pack index, and batches made of the two.

Nothing is tokenized or copied: a micro-batch reads its slices through the maps when it is asked for. Used by
`trainer` (which opens the splits), `plan` (counts) and `loop` (loaders).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from dft_common.errors import DataError
from dft_common.manifest import Manifest
from dft_common.packs import PackIndex, PackIndexInfo, choose_pack_index
from dft_common.reader import SplitReader
from dft_train.collate import Batch, collate
from dft_train.sampler import Layout, MicroBatch, StepSampler


class PackedSplit(Dataset[Batch]):
    """The packs of one split. `self[micro_batch]` is that micro-batch as tensors; `len` counts the packs."""

    def __init__(self, dataset_dir: Path, manifest: Manifest, split: str, max_length: int, attention: str) -> None:
        self.name = split
        self.reader = SplitReader(dataset_dir, split, manifest)
        self.index = _open_index(dataset_dir, manifest, split, max_length)
        self.sources = tuple(source.name for source in manifest.sources)
        self._source_ids = {name: number for number, name in enumerate(self.sources)}
        self._attention = attention
        self.blocks = self.index.blocks()
        self.lives = self.index.live_counts()
        self.tokens = self.index.token_counts()

    @property
    def info(self) -> PackIndexInfo:
        return self.index.info

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, micro: MicroBatch) -> Batch:
        slices = [piece for pack in micro.packs for piece in self.index[pack]]
        rows = [self.reader.row(piece.row, piece.start, piece.end) for piece in slices]
        try:
            sources = [self._source_ids[row.source] for row in rows]
        except KeyError as error:
            raise DataError(
                f"{self.reader.directory}: a row is of source {error}, which the manifest does not list",
                remedy="run `dft-prep verify` on the dataset, then build it again",
            ) from None
        return collate(rows, sources, micro.num_valid_tokens, self._attention)


def _open_index(dataset_dir: Path, manifest: Manifest, split: str, max_length: int) -> PackIndex:
    info = choose_pack_index(dataset_dir, split, max_length, manifest.recipe, manifest.fingerprint)
    return PackIndex(dataset_dir, info)


def tokens_before(split: PackedSplit, sampler: StepSampler, step: int) -> int:
    """Tokens in the packs of optimizer steps [0, step), over all epochs: known from the index alone."""
    epochs, steps = divmod(step, sampler.steps_per_epoch)
    packs = sampler.order(epochs)[: steps * sampler.layout.global_batch]
    return epochs * int(split.tokens.sum()) + int(split.tokens[packs].sum())


def train_sampler(split: PackedSplit, layout: Layout, seed: int) -> StepSampler:
    return StepSampler(split.blocks, split.lives, layout, index_seed=split.info.seed, seed=seed)


def eval_sampler(split: PackedSplit, layout: Layout) -> StepSampler:
    """Every pack once, in the index's order."""
    return StepSampler(split.blocks, split.lives, layout, index_seed=split.info.seed, seed=None)


def _only(batches: list[Batch]) -> Batch:
    """A batch of the loader is one MicroBatch, so there is one to hand on."""
    return batches[0]


class EpochLoader(DataLoader[Batch]):
    """A DataLoader that hands the epoch's number to its sampler, as transformers' Trainer expects of loaders."""

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        assert isinstance(sampler, StepSampler)
        sampler.set_epoch(epoch)


def make_loader(split: PackedSplit, sampler: StepSampler, *, workers: int, pin_memory: bool) -> EpochLoader:
    """The micro-batches of this rank, in the sampler's order."""
    return EpochLoader(
        split,
        batch_sampler=sampler,
        collate_fn=_only,
        num_workers=workers,
        pin_memory=pin_memory and np.size(split.blocks) > 0,
        persistent_workers=False,
    )
