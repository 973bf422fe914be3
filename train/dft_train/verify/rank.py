"""One rank of one layout of `verify`: a training by the ordinary command `train` that also notes its gradients.

The class of the trainer is replaced, in this process alone, by one that writes the gradients of each optimizer step,
averaged over the ranks and not yet clipped, into the run's directory. Started by `layouts`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WHOLE_ELEMENTS = 1 << 26
"""Up to so many trained parameters gradients are kept whole; of larger models, projections."""
_PROJECTIONS = 8


def _projected(name: str, gradient: Tensor) -> Tensor:
    """[_PROJECTIONS + 1] float32: the norm, and products with vectors of random signs, fixed for each name.

    The difference of two gradients shows in each of them by about its norm.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    flat = gradient.flatten()
    products = [flat.norm()]
    for _ in range(_PROJECTIONS):
        signs = torch.randint(0, 2, flat.shape, generator=generator, dtype=torch.int8) * 2 - 1
        products.append((flat * signs).sum())
    return torch.stack(products)


class GradientNotes:
    """Writes the gradients of step after step, on rank 0. Every rank calls it: ZeRO's parts are put together."""

    def __init__(self, model: Any, directory: Path, writes: bool) -> None:
        self._named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._whole = sum(getattr(p, "ds_numel", p.numel()) for _, p in self._named) <= WHOLE_ELEMENTS
        self._directory = directory
        self._writes = writes
        self._step = 0

    def note(self, gradient_of: Any) -> None:
        from safetensors.torch import save_file

        self._step += 1
        found: dict[str, Tensor] = {}
        for name, parameter in self._named:
            gradient = gradient_of(parameter)
            if self._writes and gradient is not None:
                gradient = gradient.detach().float().cpu()
                found[name] = gradient.clone() if self._whole else _projected(name, gradient)
        if self._writes:
            self._directory.mkdir(parents=True, exist_ok=True)
            save_file(found, self._directory / f"gradients-{self._step}.safetensors")


def noting(trainer_type: type) -> type:
    """`trainer_type`, noting gradients."""

    class Noting(trainer_type):
        _notes: GradientNotes | None = None

        def _start_notes(self) -> GradientNotes:
            folder = Path(str(self.args.output_dir)) / "gradients"
            notes = GradientNotes(self._plain_model, folder, self.is_world_process_zero())
            if self.is_deepspeed_enabled:
                from deepspeed.utils import safe_get_full_grad

                engine, step = self.deepspeed, self.deepspeed.step

                def noted(*args: Any, **kwargs: Any) -> Any:
                    if engine.is_gradient_accumulation_boundary():
                        notes.note(safe_get_full_grad)
                    return step(*args, **kwargs)

                engine.step = noted
            return notes

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self._notes is None:
                self._notes = self._start_notes()
            loss = super().training_step(*args, **kwargs)
            if not self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                self._notes.note(lambda parameter: parameter.grad)
            return loss

    return Noting


def run_rank(arguments: list[str]) -> int:
    """Train with `arguments`; the exit code."""
    from dft_train import loop
    from dft_train.train_command import train

    loop.DftTrainer = noting(loop.DftTrainer)  # pyright: ignore[reportAttributeAccessIssue]
    return train(arguments)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    os.environ.update(request["environment"])
    sys.exit(run_rank(request["arguments"]))
