"""The pack index on disk: which slices of which rows share a sequence.

A step of training is defined by the index alone: optimizer step s takes packs [s*B, (s+1)*B) of the
epoch's order. Written by `dft_prep.shards.pack`, read by the trainer and by `inspect` and `verify`. Lives
outside the manifest, so that a dataset may have several; each has a JSON file beside it with its
options, counts and checksum.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from dft_common.errors import DataError
from dft_common.fingerprint import hash_file
from dft_common.reader import open_stream
from dft_common.schema import PACKS_DIR


class Slice(NamedTuple):
    """Tokens [start, end) of a row; `live` of them are trained labels (never the first)."""

    row: int
    start: int
    end: int
    live: int


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """What an index does not train of one source's rows."""

    rows: int
    """Rows that lose something."""
    tokens: int
    """Tokens that are in no slice."""
    trained_tokens: int
    """Labels of the whole rows that are labels of no slice; a slice's first token, which is none, may be among them."""


class PackIndexInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The options that made an index, and what is in it."""

    name: str
    split: str
    max_length: int
    overlong: str
    packing: bool
    seed: int
    dataset_fingerprint: str
    packs: int
    slices: int
    tokens: int
    live: int
    """Trained labels: what num_valid_tokens of a whole epoch adds up to."""
    left_out: dict[str, int]
    """Rows that no pack holds, by reason."""
    lost: dict[str, Lost]
    """By source; a source that loses nothing is not in it."""
    bytes: int
    checksum: str


class PackIndex:
    """The packs of one split, memory-mapped."""

    def __init__(self, dataset_dir: Path, info: PackIndexInfo) -> None:
        self.info = info
        path = dataset_dir / PACKS_DIR / info.name
        self.batches: list[pa.RecordBatch] = open_stream(path)
        self._ends = list(accumulate(batch.num_rows for batch in self.batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> list[Slice]:
        """The slices of one pack, in the order in which they are laid out."""
        if not 0 <= number < len(self):
            raise IndexError(f"pack {number} of {len(self)}")
        at = bisect_right(self._ends, number)
        batch = self.batches[at]
        number -= self._ends[at] - batch.num_rows
        columns = (batch.column(name)[number].values.to_pylist() for name in ("rows", "starts", "ends", "lives"))
        return [Slice(*values) for values in zip(*columns, strict=True)]

    def blocks(self) -> np.ndarray:
        """[packs] int32: the block of rows that each pack is from. Blocks are shuffled, then packs nearby."""
        if not self.batches:
            return np.zeros(0, np.int32)
        return np.concatenate([batch.column("block").to_numpy() for batch in self.batches])

    def _sums(self, values: list[np.ndarray]) -> np.ndarray:
        sums = []
        for batch, array in zip(self.batches, values, strict=True):
            offsets = batch.column("rows").offsets.to_numpy()
            running = np.concatenate([[0], np.cumsum(array, dtype=np.int64)])
            sums.append(running[offsets[1:]] - running[offsets[:-1]])
        return np.concatenate(sums) if sums else np.zeros(0, np.int64)

    def live_counts(self) -> np.ndarray:
        """[packs] int64: trained labels of each pack."""
        return self._sums([batch.column("lives").values.to_numpy() for batch in self.batches])

    def sum_over_slices(self, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[packs] int64: the sum over each pack's slices of `value`, a function of their lengths in tokens
        ([slices] int64 -> [slices] int64)."""
        ends = [batch.column("ends").values.to_numpy() for batch in self.batches]
        starts = [batch.column("starts").values.to_numpy() for batch in self.batches]
        return self._sums([value(end.astype(np.int64) - start) for end, start in zip(ends, starts, strict=True)])

    def token_counts(self) -> np.ndarray:
        """[packs] int64: tokens of each pack."""
        return self.sum_over_slices(lambda lengths: lengths)


def list_pack_indexes(dataset_dir: Path, split: str) -> list[PackIndexInfo]:
    """Every index of `split` that the dataset has, by name."""
    infos = []
    for path in sorted((dataset_dir / PACKS_DIR).glob(f"{split}-*.json")):
        try:
            info = msgspec.json.decode(path.read_bytes(), type=PackIndexInfo)
        except msgspec.MsgspecError as error:
            raise DataError(
                f"{path}: damaged: {error}", remedy=f"remove it and run `dft-prep pack {dataset_dir}`"
            ) from None
        infos.append(info)
    return [info for info in infos if info.split == split]


def check_pack_index(dataset_dir: Path, info: PackIndexInfo, dataset_fingerprint: str) -> None:
    """Raise DataError where the index file is missing, damaged, or made for another dataset."""
    path = dataset_dir / PACKS_DIR / info.name
    remedy = f"run `dft-prep pack {dataset_dir} --max_length {info.max_length}`"
    if info.dataset_fingerprint != dataset_fingerprint:
        raise DataError(f"{path}: this pack index was made for other rows than the dataset has", remedy=remedy)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: the pack index is missing", remedy=remedy) from None
    if size != info.bytes or hash_file(path) != info.checksum:
        raise DataError(f"{path}: the pack index is damaged (its checksum differs)", remedy=remedy)


def _describe(info: PackIndexInfo) -> str:
    return str(info.max_length) if info.packing else f"{info.max_length} without packing"


def choose_pack_index(
    dataset_dir: Path, split: str, max_length: int, recipe: dict, fingerprint: str, packing: bool | None = None
) -> PackIndexInfo:
    """The index of `split` for `max_length`: the only one, or the one with the build's own other options.

    With `packing` one that packs, or one that does not. Checked (`check_pack_index`) before it is returned. Raises
    DataError, with the command that makes one, where there is none.
    """
    infos = list_pack_indexes(dataset_dir, split)
    fitting = [info for info in infos if info.max_length == max_length and packing in (None, info.packing)]
    if not fitting:
        have = ", ".join(sorted(map(_describe, infos))) or "none"
        flags = f"--max_length {max_length}" + ("" if packing is None else f" --packing {packing}")
        raise DataError(
            f"{dataset_dir}: no pack index of the {split} split for {flags} (there is: {have})",
            remedy=f"run `dft-prep pack {dataset_dir} {flags}` (seconds; tokenizes nothing)",
        )
    if len(fitting) > 1:
        wanted = {**recipe, "packing": recipe.get("packing") if packing is None else packing}
        own = [
            info
            for info in fitting
            if all(getattr(info, option) == wanted.get(option) for option in ("overlong", "packing", "seed"))
        ]
        fitting = own or fitting
    if len(fitting) > 1:
        names = ", ".join(info.name for info in fitting)
        raise DataError(
            f"{dataset_dir}: several pack indexes of the {split} split fit --max_length {max_length}: {names}",
            remedy=f"remove from {dataset_dir / PACKS_DIR} those that are not meant",
        )
    check_pack_index(dataset_dir, fitting[0], fingerprint)
    return fitting[0]
