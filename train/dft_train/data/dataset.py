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
from dft_train.data.collate import Batch, collate
from dft_train.data.flops import attended_pairs
from dft_train.data.sampler import Layout, MicroBatch, StepSampler
from dft_train.ranks.signals import spare_worker


class PackedSplit(Dataset[Batch]):
    """The packs of one split. `self[micro_batch]` is that micro-batch as tensors; `len` counts the packs."""

    def __init__(
        self,
        dataset_dir: Path,
        manifest: Manifest,
        split: str,
        max_length: int,
        attention: str,
        packing: bool | None = None,
    ) -> None:
        self.name = split
        self.reader = SplitReader(dataset_dir, split, manifest)
        self.index = _open_index(dataset_dir, manifest, split, max_length, packing)
        self.sources = tuple(source.name for source in manifest.sources)
        self._source_ids = {name: number for number, name in enumerate(self.sources)}
        self._attention = attention
        self.blocks = self.index.blocks()
        self.lives = self.index.live_counts()
        self.tokens = self.index.token_counts()

    def pairs(self, window: int | None) -> np.ndarray:
        """[packs] int64: pairs of tokens that see each other; `window` as in `flops.attended_pairs`."""
        return self.index.sum_over_slices(lambda lengths: attended_pairs(lengths, window))

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
        tokens = self.tokens[list(micro.packs)].tolist()
        return collate(
            rows,
            sources,
            micro.num_valid_tokens,
            self._attention,
            pack_tokens=tokens,
            step_tokens=micro.step_tokens,
            packs=micro.packs,
        )


def _open_index(dataset_dir: Path, manifest: Manifest, split: str, max_length: int, packing: bool | None) -> PackIndex:
    info = choose_pack_index(dataset_dir, split, max_length, manifest.recipe, manifest.fingerprint, packing)
    return PackIndex(dataset_dir, info)


def sum_before(values: np.ndarray, sampler: StepSampler, step: int) -> float:
    """The sum of `values` [packs] over the packs of optimizer steps [0, step), all epochs: known from the index
    alone. Exact where it is a whole number below 2^53, as numbers of tokens are."""
    epochs, steps = divmod(step, sampler.steps_per_epoch)
    packs = sampler.order(epochs)[: steps * sampler.layout.global_batch]
    return epochs * float(values.sum()) + float(values[packs].sum())


def _sampler(split: PackedSplit, layout: Layout, seed: int | None, costs: np.ndarray | None) -> StepSampler:
    return StepSampler(
        split.blocks,
        split.lives,
        layout,
        tokens=split.tokens,
        costs=split.tokens if costs is None else costs,
        index_seed=split.info.seed,
        seed=seed,
    )


def train_sampler(split: PackedSplit, layout: Layout, seed: int, costs: np.ndarray | None = None) -> StepSampler:
    """`costs` [packs] float64: `flops.pack_flops` where the model is known, else the tokens."""
    return _sampler(split, layout, seed, costs)


def eval_sampler(split: PackedSplit, layout: Layout, costs: np.ndarray | None = None) -> StepSampler:
    """Every pack once; steps take them in the index's order."""
    return _sampler(split, layout, None, costs)


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
        worker_init_fn=spare_worker,
    )
