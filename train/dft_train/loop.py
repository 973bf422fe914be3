"""transformers' Trainer with our data path, loss, metrics and checkpoints. Made by `trainer`.

Trainer keeps the loop, optimizer, scheduler, trackers and DeepSpeed. What is replaced: batches come from the pack
index and carry their step's num_valid_tokens; the loss is `head.HeadTap.loss`; every number that is logged is a sum
over all tokens of all ranks divided once; what a checkpoint's model is, is written by `release`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_callback import PrinterCallback

from dft_train.checkpoints.checkpointed import CheckpointedTrainer
from dft_train.checkpoints.same_model import check_same_model
from dft_train.checkpoints.whole import RunState, check_same_steps, read_state, step_of
from dft_train.data.collate import Batch
from dft_train.data.dataset import EpochLoader, PackedSplit, eval_sampler, make_loader, train_sampler
from dft_train.data.flops import model_work, pack_flops, peak_flops
from dft_train.data.prefetch import StepReader, read_ahead
from dft_train.data.sampler import eval_layout, train_layout
from dft_train.faults.step import EvaluationStopped, Faults
from dft_train.guards.first_batch import Guard, ask_model, verdict_key
from dft_train.guards.probe import LogitTransform
from dft_train.loss import LossStats
from dft_train.metrics.console import ConsoleLines
from dft_train.metrics.journal import Journal
from dft_train.metrics.sums import Clock, SourceSums, Speed, StepSums, evaluation_names, peak_memory_gib, ratios
from dft_train.models.head import HeadTap, LossRequest
from dft_train.models.lora import is_adapted, plain_model
from dft_train.models.router import router_loss
from dft_train.ranks.signals import Signals
from dft_train.release.card import progress
from dft_train.release.directory import Release
from dft_train.schedule import AlphaSchedule
from dft_train.weights.export import read_model


class DftTrainer(CheckpointedTrainer):
    """Trains and evaluates on packed splits. `train_split` and `eval_split` may be None where not needed."""

    loss_is_scaled_for_ga = True
    """`compute_loss` divides by num_valid_tokens of the whole step, so nothing is left to divide."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_split: PackedSplit | None,
        eval_split: PackedSplit | None,
        dataset_dir: Path,
        dataset_fingerprint: str,
        objective: str,
        dft_alpha: AlphaSchedule,
        objective_options: Mapping[str, float],
        fused_loss: str,
        attention: str,
        peak_tflops: float | None,
        router_aux_loss_coef: float | None,
        signals: Signals,
        on_nan: str,
        guards: bool,
        release: Release,
    ) -> None:
        # With LoRA the adapters are inside it, and the PeftModel around it is what Trainer saves and resumes.
        plain = plain_model(model)
        self._tap = HeadTap(plain)
        self._release = release
        recomputes: Any = (args.activation_checkpointing and args.activation_checkpointing_kwargs) or {}
        reentrant = bool(recomputes.get("use_reentrant"))
        self._router = router_loss(plain, router_aux_loss_coef, reentrant=reentrant)
        self._tap.wants_router = self._router is not None
        self._plain_model = plain
        super().__init__(model=model, args=args, train_dataset=train_split, eval_dataset=eval_split)
        self.remove_callback(PrinterCallback)
        if self.is_world_process_zero():
            self.add_callback(ConsoleLines())
            self.add_callback(Journal(Path(str(args.output_dir))))
        self._dataset_dir = dataset_dir
        self._dataset_fingerprint = dataset_fingerprint
        self._attention = attention
        self._objective = objective
        self._dft_alpha = dft_alpha
        self._objective_options = objective_options
        self._fused_loss = fused_loss
        self._transform: LogitTransform | None = None
        self._guards = guards
        self._more_sums = ("aux_loss",) if self._router else ()
        self._sums = StepSums(args.device, len(self._more_sums))
        self._clock = Clock()
        self._reader = StepReader()
        self._work = model_work(plain, plain.config, self._tap.head)
        self._tracker_names: dict[str, str] = {}
        self.tracker_runs: dict[str, str] = {}
        self.first_step = 0
        self._layout = train_layout(args)
        if train_split is not None:
            flops = pack_flops(train_split, self._work)
            self._sampler = train_sampler(train_split, self._layout, self._data_seed, flops)
            self.faults = Faults(self, head=self._tap.head, signals=signals, on_nan=on_nan, dataset_dir=dataset_dir)
            self.add_callback(self.faults)
            peak = peak_flops(args.device, peak_tflops)
            self._speed = Speed(self._sampler, train_split.tokens, flops, peak and peak * args.world_size)

    # Data

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _loader(self, split: PackedSplit, sampler: Any) -> EpochLoader:
        pin_memory = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        return make_loader(split, sampler, workers=self.args.dataloader_num_workers, pin_memory=pin_memory)

    def get_train_dataloader(self) -> EpochLoader:
        assert isinstance(self.train_dataset, PackedSplit)
        return self._loader(self.train_dataset, self._sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochLoader:
        split = eval_dataset or self.eval_dataset
        assert isinstance(split, PackedSplit)
        return self._loader(split, eval_sampler(split, eval_layout(self.args), pack_flops(split, self._work)))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The micro-batches of one optimizer step; each carries its step's num_valid_tokens, so nothing is counted."""
        with self._clock.waiting():
            return self._reader.take(epoch_iterator, num_batches), None

    def _prepare_inputs(self, inputs: Any) -> Any:
        # Trainer's own would cast floats, loss weights among them, to DeepSpeed's 16 bits.
        return inputs.to(self.args.device) if isinstance(inputs, Batch) else super()._prepare_inputs(inputs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing to add up: `store_flos` knows it from the pack index."""
        return 0

    def store_flos(self) -> None:
        self.state.total_flos = self._speed.flops(self.state.global_step)

    # Loss

    def _alpha_at(self, step: int) -> float:
        """dft_alpha of the optimizer step that `step` others come before; an evaluation takes that of the next one."""
        return self._dft_alpha.at(step, self.state.max_steps)

    def _ask_model(self, model: Any, batch: Batch, request: LossRequest) -> LogitTransform:
        """At the first batch."""
        args, config = self.args, self._plain_model.config
        half = torch.bfloat16 if args.bf16 else torch.float16
        dtype = half if args.bf16 or args.fp16 else self._plain_model.dtype
        splits: Any = (self.train_dataset, self.eval_dataset)
        sizes = (args.per_device_train_batch_size, args.per_device_eval_batch_size)
        used = [(split.info, size) for split, size in zip(splits, sizes, strict=True) if split is not None]
        packs_share = any(info.slices > info.packs or size > 1 for info, size in used)
        key = verdict_key(config, args=args, attention=self._attention, dtype=dtype, request=request)
        guard = Guard(
            tap=self._tap,
            config=config,
            attention=self._attention,
            device=args.device,
            dtype=dtype,
            packs_share=packs_share,
            directory=Path(str(args.output_dir)),
            key={**key, "packs_share": packs_share},
        )
        started = time.monotonic()
        found = ask_model(guard, model, batch, request, full=self._guards)
        self._clock.add_pause(time.monotonic() - started)
        return found

    def _loss(self, model: Any, batch: Batch, *, num_valid_tokens: float, per_token: bool) -> tuple[Tensor, LossStats]:
        request = LossRequest(
            labels=batch.labels,
            loss_weights=batch.loss_weights,
            num_valid_tokens=num_valid_tokens,
            objective=self._objective,
            dft_alpha=self._alpha_at(self.state.global_step),
            objective_options=self._objective_options,
            fused=self._fused_loss,
            per_token=per_token,
            live=batch.live,
        )
        if self._transform is None:
            self._transform = self._ask_model(model, batch, request)
        request = request._replace(**self._transform._asdict())
        return self._tap.loss(model, batch.inputs, request)  # pyright: ignore[reportArgumentType]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss, times the number of ranks: they average their gradients."""
        loss, stats = self._loss(model, inputs, num_valid_tokens=max(inputs.num_valid_tokens, 1), per_token=False)
        more = []
        if self._router is not None:
            logits, self._tap.router_logits = self._tap.router_logits, None
            auxiliary = self._router(logits or (), inputs.pack_tokens, inputs.step_tokens)
            loss = loss + self._router.coefficient * auxiliary
            # Like the others a sum over live tokens, so that what is logged is a mean over them.
            more = [auxiliary.detach() * inputs.num_valid_tokens]
        self._sums.add_if_finite(stats, *more)
        loss = loss * self.args.world_size
        self.faults.set_loss(loss, stats.ce_sum, stats.live)
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.faults.begin_micro(inputs.packs, last=self.accelerator.sync_gradients)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.faults.end_micro()
        # Of a step that `faults` leaves out, or that ends the run.
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self.faults.check_norm(super()._get_grad_norm(model, grad_norm=grad_norm))

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *rest: Any, **more: Any
    ) -> None:
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._log_steps(grad_norm, more["learning_rate"])
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **more)
        except EvaluationStopped:
            self._postponed_save = False
            self.save_now(model, trial)

    # Metrics

    def _reduce(self, sums: Tensor) -> Tensor:
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def _training_metrics(self) -> dict[str, float]:
        """The numbers since the last log line."""
        measured = [self._clock.waited, peak_memory_gib(self.args.device)]
        ranks = {"rank": self.args.process_index, "world_size": self.args.world_size}
        sums, (waited, memory) = self._sums.total_and_worst(measured, self._reduce, **ranks)
        self._sums.clear()
        seconds = self._clock.mark()
        alpha = {"dft_alpha": self._alpha_at(self.state.global_step - 1)} if self._objective == "dft" else {}
        metrics = {**ratios(sums, self._more_sums), **alpha}
        metrics |= self._speed.metrics(self.state.global_step, seconds)
        metrics |= {"data_wait": waited / seconds, "peak_memory_gib": memory}
        skipped = self.faults.nonfinite.skipped
        return metrics | {"skipped_steps": skipped} if skipped else metrics

    def _log_steps(self, grad_norm: Any, learning_rate: float) -> None:
        """In place of Trainer's own log line, for which every rank would be asked three times; here it is once."""
        metrics = self._training_metrics()
        optimizer = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
        # Each rank's own part, until `_finalize_training`.
        self._total_loss_scalar += self._tr_loss.item()
        self._tr_loss.zero_()
        self._globalstep_last_logged = self.state.global_step
        self.store_flos()
        self.log({"loss": metrics.pop("loss"), **optimizer, "learning_rate": learning_rate, **metrics})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Into trainer_state.json with plain names, and to the trackers with a source as a folder of its own."""
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        shown = {self._tracker_names.get(name, name): value for name, value in logs.items()}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, shown)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._clock = Clock()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._reader.close()

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        if self.faults.stopping:
            return self.faults.end_early()
        # Trainer would take rank 0's part for the mean.
        self._tr_loss = self._reduce(self._tr_loss + self._total_loss_scalar) / self.args.world_size
        self._total_loss_scalar = 0.0
        return super()._finalize_training(trial, num_train_samples, start_time)

    # Evaluation

    def _model_for_evaluation(self) -> Any:
        # Not the plain model: with LoRA accelerate's autocast is around the adapted one.
        model: Any = self.model
        if self.is_deepspeed_enabled and self.deepspeed is None:
            deepspeed_init(self, num_training_steps=0, inference=True)
        if self.model_wrapped is self.model:
            if self.is_deepspeed_enabled:
                self.model_wrapped = self.deepspeed = self.accelerator.prepare(self._plain_model)
            else:
                self.model_wrapped = self.accelerator.prepare_model(model, evaluation_mode=True)
        return self.model_wrapped if self.is_deepspeed_enabled else model

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Every token of the split once, over all ranks; `PREFIX_loss` and so on, and `PREFIX_<source>_loss`."""
        start = time.monotonic()
        split = eval_dataset or self.eval_dataset
        assert isinstance(split, PackedSplit)
        model = self._model_for_evaluation()
        model.eval()
        sums = SourceSums(split.sources, self.args.device)
        with torch.no_grad():
            batches = read_ahead(iter(self.get_eval_dataloader(split)), room=2)
            for batch in self.faults.until_stopped(batches) if self.is_in_train else batches:
                batch = batch.to(self.args.device)
                _, stats = self._loss(model, batch, num_valid_tokens=1.0, per_token=True)
                assert stats.tokens is not None
                # A label stands one place after the token that predicts it; within a slice both are of one source.
                sums.add(stats, batch.source_ids.reshape(-1))
        overall, by_source = sums.metrics(self._reduce)
        metrics, tracked = evaluation_names(metric_key_prefix, overall, by_source)
        self._tracker_names |= tracked
        seconds = time.monotonic() - start
        metrics[f"{metric_key_prefix}_runtime"] = seconds
        metrics[f"{metric_key_prefix}_tokens_per_second"] = int(split.tokens.sum()) / seconds
        self._clock.add_pause(seconds)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def run_state(self, unlogged: list[float]) -> RunState:
        assert isinstance(self.train_dataset, PackedSplit)
        return RunState(
            dataset_fingerprint=self._dataset_fingerprint,
            pack_index=self.train_dataset.info.checksum,
            data_seed=self._data_seed,
            global_batch=self._layout.global_batch,
            unlogged=unlogged,
            ranks=self.args.world_size,
            tracker_runs=self.tracker_runs,
        )

    def state_to_save(self) -> RunState:
        return self.run_state(self._sums.total(self._reduce))

    def saved(self, seconds: float) -> None:
        self._clock.add_pause(seconds)

    def restore(self, checkpoint: Path) -> None:
        """Take up the sums of a checkpoint, which must be one of this run; before `train`. Raises DataError."""
        state, step = read_state(checkpoint), step_of(checkpoint)
        check_same_steps(checkpoint, state, self.run_state([]))
        check_same_model(checkpoint, self.model, self._release.origin)
        if self.is_world_process_zero():
            self._sums.add_sums(state.unlogged)
        self._speed.start(step)
        self.tracker_runs, self.first_step = state.tracker_runs, step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint's model, or the final one where `_internal_call` is False or `output_dir` None (as when Trainer
        pushes to a hub); on all ranks. See `release`."""
        directory = Path(str(output_dir or self.args.output_dir))
        writes, at, final = self.args.should_save, progress(self.state), output_dir is None or not _internal_call
        self._release.write(self.model, directory, at, engine=self.deepspeed, writes=writes, final=final)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`release` wrote it with the model."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Without DeepSpeed."""
        if is_adapted(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            read_model(self._plain_model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or is_adapted(self.model):
            super()._load_best_model()
        else:
            read_model(self._plain_model, Path(str(self.state.best_model_checkpoint)))
