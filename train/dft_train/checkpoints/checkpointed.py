"""transformers' Trainer whose checkpoints are whole, and which goes on from them as if it had never stopped.

The parts of Trainer that save and resume, replaced; `loop.DftTrainer` is one of these. The writing itself is in
`saving`, choosing a checkpoint in `resume`, ZeRO's states for another number of ranks in `reshard`.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, set_seed
from transformers.trainer_callback import ExportableState

from dft_train.checkpoints import saving
from dft_train.checkpoints.whole import RunState, read_state
from dft_train.ranks.agree import Agreement

_FROM_FLAGS = ("initial_lr", "weight_decay", "betas", "eps")
"""Of a group of parameters: what the command line says, and no state of the optimizer."""


class NotSaved(Exception):
    """A checkpoint could not be written, and a warning has said so: nobody is to be told that it was."""


class CheckpointedTrainer(Trainer):
    """`state_to_save` and `saved` are the subclass's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.writes = saving.Writes()
        self.agreement = Agreement(self.args.ddp_timeout_delta)
        self._postponed_save = False
        self._given: list[dict[str, Any]] = []
        """_FROM_FLAGS of each group of parameters."""

    def state_to_save(self) -> RunState:
        """What goes into a checkpoint besides what Trainer keeps; called on all ranks."""
        raise NotImplementedError

    def saved(self, seconds: float) -> None:
        """Called after a save with the time that it took."""

    # Saving

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        """Called after each step, and once more at an epoch's end. What is saved at an epoch's last step waits for
        the latter: it evaluates and logs too, and a run that goes on from there would not do that again."""
        if self._postponed_save:
            self._postponed_save, self.control.should_save = False, True
        elif self.control.should_save and self._ends_an_epoch():
            self._postponed_save, self.control.should_save = True, False
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        except NotSaved:
            self.control.should_save = False

    def save_now(self, model: Any, trial: Any) -> None:
        """A checkpoint, in between two steps of `_maybe_log_save_evaluate`."""
        with contextlib.suppress(NotSaved):
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _ends_an_epoch(self) -> bool:
        return self.state.epoch is not None and float(self.state.epoch).is_integer()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        start = time.monotonic()
        self.store_flos()
        before = self.state.best_model_checkpoint
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (
            self.state.best_global_step == self.state.global_step or directory.is_dir()
        ):
            self.state.best_model_checkpoint = str(directory)
        self._export_callbacks()
        written = saving.save_checkpoint(self, self.state_to_save())
        self.saved(time.monotonic() - start)
        if not written:
            self.state.best_model_checkpoint = before
            raise NotSaved

    def _export_callbacks(self) -> None:
        """The callbacks' states, such as an early stopping's patience, into `self.state`."""
        states: dict[str, list[dict]] = {}
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        found: Any = {name: one[0] if len(one) == 1 else one for name, one in states.items()}
        self.state.stateful_callbacks = found

    def save_final(self) -> None:
        """The model and trainer_state.json into output_dir. Raises DataError where they cannot be written."""
        saving.save_final(self)

    # Resuming

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """(Epochs to pass over, micro-batches of the next one). The intervals are this command line's, not those that
        the checkpoint was written with; and of a run that has done its steps all epochs are over: Trainer would do
        one step more."""
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.compute_steps(self.args, max_steps)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else found

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not resume_from_checkpoint or not self.is_deepspeed_enabled or self._same_ranks(resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        from dft_train.checkpoints.reshard import load_resharded

        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_resharded(self.model_wrapped, Path(resume_from_checkpoint))
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Before a checkpoint is loaded: the groups are as the flags made them."""
        scheduler: Any = super().create_scheduler(*args, **kwargs)
        if isinstance(scheduler, LambdaLR):
            groups = scheduler.optimizer.param_groups
            self._given = [{name: group[name] for name in _FROM_FLAGS if name in group} for group in groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The states; but rates and decay are this command line's, and so is the schedule, from the next step on."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = self.lr_scheduler
        if checkpoint is None or not self._given:
            return
        scheduler.base_lrs = [group["initial_lr"] for group in self._given]
        rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        # As LambdaLR itself does: the same flags give the very same numbers.
        scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in rates]
        groups = zip(scheduler.optimizer.param_groups, self._given, scheduler._last_lr, strict=True)
        for group, given, rate in groups:
            group.update(given, lr=rate)

    def _same_ranks(self, checkpoint: str) -> bool:
        return read_state(Path(checkpoint)).ranks in (0, self.args.world_size)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Another number of ranks has no states to take up: each rank starts from the seed and the step instead."""
        if checkpoint is None or self._same_ranks(checkpoint):
            super()._load_rng_state(checkpoint)
        else:
            set_seed(self.args.seed + self.state.global_step + self.args.process_index)
