"""What can go wrong in a step, watched from inside transformers' loop: signals, NaN, loss spikes. Made by `loop`.

The order of things in one optimizer step:

    last micro-batch begins   every rank says whether it was signalled, and what the step before cost  (`begin_micro`)
    gradients are there       a norm that is not finite: the step is left out, or ends the run          (`check_norm`)
    the step's end            the answer is taken: all stop here, or none does; the last step's loss is judged
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from dft_common import logs
from dft_train.checkpoints.whole import last_whole, what_is_missing
from dft_train.faults.nonfinite import DeepSpeedStep, NonFinite, PlainStep, Step
from dft_train.faults.spikes import Spikes, Worst, tell
from dft_train.faults.trace import MicroCost, RowNames, StepTrace
from dft_train.ranks.agree import Agreement
from dft_train.ranks.signals import Signals
from dft_train.settings.command_line import command_to_go_on

T = TypeVar("T")


class EvaluationStopped(Exception):
    """All ranks leave an evaluation at the same batch, because one of them was signalled."""


class Faults(TrainerCallback):
    """The trainer's ears. `trainer`: a DftTrainer with a train split."""

    def __init__(self, trainer: Any, *, head: nn.Module, signals: Signals, on_nan: str, dataset_dir: Path) -> None:
        self.stopping = False
        """Agreed by all ranks: the run ends with this step."""
        args = trainer.args
        self._trainer = trainer
        self._signals = signals
        self._output_dir = Path(args.output_dir)
        self._rank = args.process_index
        self._agreement: Agreement = trainer.agreement
        self._trace = StepTrace(trainer.model.get_input_embeddings(), head)
        self._names = RowNames(trainer.train_dataset, dataset_dir, self._rank)
        self.nonfinite = NonFinite(
            on_nan=on_nan,
            trace=self._trace,
            names=self._names,
            agreement=self._agreement,
            rank=self._rank,
            output_dir=self._output_dir,
        )
        self._spikes = Spikes()
        self._how: Step | None = None
        self._costs: list[MicroCost] = []
        """Of this rank's micro-batches in the last step, until all ranks' are summed; none of a step left out."""
        self._next_costs: list[MicroCost] = []
        self._saved_step = -1
        self._training = False

    # Within a step, called by the trainer

    def begin_micro(self, packs: tuple[int, ...], *, last: bool) -> None:
        """Before a micro-batch's forward pass; `last` of its step on this rank."""
        self._trace.begin(packs)
        if last:
            self._ask()

    def set_loss(self, loss: Tensor, ce_sum: Tensor, live: Tensor) -> None:
        """Between the forward and the backward pass; all 0-dim."""
        self._trace.set_loss(loss, ce_sum, live)

    def end_micro(self) -> None:
        self._trace.end()

    def check_norm(self, norm: Any) -> Any:
        """The norm of the step's gradients, to be logged; None where the step is left out. Raises DataError."""
        number = None if norm is None else float(norm)
        if self._how is None:
            deepspeed = self._trainer.is_deepspeed_enabled
            self._how = DeepSpeedStep(self._trainer.deepspeed) if deepspeed else PlainStep(self._trainer)
        left_out = self.nonfinite.leaves_out(self._trainer.state.global_step + 1, number, self._how)
        # The norm has waited for the device, so this does not.
        self._next_costs = [] if left_out else self._trace.costs()
        return None if left_out else norm

    def _ask(self) -> None:
        ce_sum, live = (sum(getattr(cost, name) for cost in self._costs) for name in ("ce_sum", "live"))
        self._agreement.ask(float(self._signals.number is not None), ce_sum, live)

    def _take_answer(self, step: int) -> None:
        """`step`: the one before, of which the sums are."""
        signalled, ce_sum, live = self._agreement.answer()
        self.stopping = self.stopping or signalled > 0
        spike = self._spikes.add(step, ce_sum, live)
        if spike is None:
            return
        worst = self._agreement.gather(self._worst())
        if self._rank == 0:
            tell(spike, worst, self._output_dir)

    def _worst(self) -> Worst:
        """Of this rank, in the step before."""
        if not self._costs:
            return Worst(0.0, [])
        number = max(range(len(self._costs)), key=lambda at: self._costs[at].mean)
        return Worst(self._costs[number].mean, self._names.name(number, self._costs[number].packs))

    # Callbacks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.is_deepspeed_enabled:
            # Now, so that the first step is guarded too.
            self._how = DeepSpeedStep(self._trainer.deepspeed)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._signals.began()
        self._training = True
        self._trace.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._take_answer(state.global_step - 1)
        self._costs = self._next_costs
        if self.stopping:
            # An evaluation may take longer than whoever sent the signal is willing to wait.
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_step = state.global_step
        # Saving takes long: a signal that came meanwhile needs no further step, and no further checkpoint.
        self.stopping = self.stopping or self._signalled_now()
        control.should_training_stop = control.should_training_stop or self.stopping

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopping:
            control.should_evaluate = False
            control.should_save = self._saved_step != state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False
        if self._costs:
            self._ask()
            self._take_answer(state.global_step)

    def _signalled_now(self) -> bool:
        return self._agreement.sum_now(float(self._signals.number is not None))[0] > 0

    # Evaluation

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of an evaluation. Raises EvaluationStopped, on all ranks before the same one."""
        for batch in batches:
            if self._training:
                if self._agreement.is_open and self._agreement.answer()[0] > 0:
                    self.stopping = True
                    raise EvaluationStopped
                self._agreement.ask(float(self._signals.number is not None))
            yield batch
        if self._agreement.is_open:
            self._agreement.answer()

    # The end

    def end_early(self) -> TrainOutput:
        """In place of what Trainer does after the last step: a run that is stopped has no result."""
        state = self._trainer.state
        self._trainer.callback_handler.on_train_end(self._trainer.args, state, self._trainer.control)
        return TrainOutput(state.global_step, math.nan, {})

    def tell_how_to_go_on(self) -> None:
        """What was saved, and the command to type. On rank 0."""
        if self._rank != 0:
            return
        name, step, steps = self._signals.name, self._trainer.state.global_step, self._trainer.state.max_steps
        directory = self._output_dir / f"checkpoint-{step}"
        last = directory if what_is_missing(directory) is None else last_whole(self._output_dir)
        saved = f"saved {directory}" if last == directory else f"{directory} could not be written, "
        if last != directory:
            saved += f"the last one is {last}" if last else "and there is no other"
        if last is None:
            go_on = "The run starts anew, with the same command, once there is room"
        elif self._trainer.args.save_only_model:
            go_on = (
                "It holds no optimizer state (--save_only_model True), so it cannot be resumed: start anew from its "
                f"weights with --model_name_or_path {last}"
            )
        else:
            go_on = f"To go on:\n  {command_to_go_on()}"
        logs.get_logger().warning("%s: stopped at step %d of %d, %s. %s", name, step, steps, saved, go_on)
