"""A directory with a trained model: weights, configuration, tokenizer and card. Called by `loop` on every rank.

A checkpoint holds what is trained, so with LoRA the adapters; the final model too, unless they are to be merged.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from dft_common.manifest import encode_json, write_atomically
from dft_common.schema import TOKENIZER_DIR
from dft_train.models import lora
from dft_train.release.card import CARD_NAME, ORIGIN_NAME, Origin, Progress, is_ours, model_card, origin_record
from dft_train.weights.export import write_model


def _copy_tokenizer(dataset_dir: Path, output_dir: Path) -> None:
    """The dataset's tokenizer and chat template, beside the weights that learnt them."""
    for path in sorted((dataset_dir / TOKENIZER_DIR).iterdir()):
        if path.is_file():
            shutil.copyfile(path, output_dir / path.name)


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """What every save of a run needs."""

    origin: Origin
    dataset_dir: Path
    """Its tokenizer goes beside the weights."""
    output_dir: Path
    """Of the run. A README.md in it that is not the run's stays."""
    merges: bool
    """Whether the final model is the whole one, adapters merged into its weights."""

    def write(self, model: Any, directory: Path, at: Progress, *, engine: Any, writes: bool, final: bool) -> None:
        """Write `model` into `directory`, which is new or empty; ranks without `writes` only help to gather.

        Raises OSError on a writing rank, once no other rank waits for it.
        """
        origin = self.origin
        merges = final and self.merges
        if merges:
            origin = msgspec.structs.replace(origin, kind="merged")
        if lora.is_adapted(model) and not merges:
            lora.write_adapter(model, directory, engine=engine, writes=writes)
            if writes:
                lora.plain_model(model).generation_config.save_pretrained(directory)
        else:
            sources = lora.merged_sources(model) if merges else None
            write_model(lora.plain_model(model), directory, engine=engine, writes=writes, sources=sources)
        if not writes:
            return
        _copy_tokenizer(self.dataset_dir, directory)
        write_atomically(directory / ORIGIN_NAME, encode_json(origin_record(origin, at)))
        if not final or is_ours(self.output_dir / CARD_NAME):
            write_atomically(directory / CARD_NAME, model_card(origin, at).encode())
