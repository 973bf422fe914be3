"""transformers' Trainer with our data path, loss, metrics and checkpoints. Made by `trainer`.

Trainer keeps the loop, optimizer, scheduler, trackers and DeepSpeed. What is replaced: batches come from the pack
index and carry their step's num_valid_tokens; the loss is `head.HeadTap.loss`; every number that is logged is a sum
over all tokens of all ranks divided once; checkpoints get the dataset's tokenizer.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_callback import PrinterCallback

from dft_train.checkpoints import RunState, copy_tokenizer, write_state
from dft_train.collate import Batch
from dft_train.console import ConsoleLines
from dft_train.dataset import EpochLoader, PackedSplit, eval_sampler, make_loader, tokens_before, train_sampler
from dft_train.head import HeadTap, LossRequest
from dft_train.loss import LossStats
from dft_train.metrics import Clock, SourceSums, StepSums, ratios
from dft_train.model import count_parameters
from dft_train.probe import LogitTransform, probe_model
from dft_train.sampler import eval_layout, train_layout


class DftTrainer(Trainer):
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
        dft_alpha: float,
        attention: str,
    ) -> None:
        self._tap = HeadTap(model)
        self._plain_model = model
        super().__init__(model=model, args=args, train_dataset=train_split, eval_dataset=eval_split)
        self.remove_callback(PrinterCallback)
        if self.is_world_process_zero():
            self.add_callback(ConsoleLines())
        self._dataset_dir = dataset_dir
        self._dataset_fingerprint = dataset_fingerprint
        self._attention = attention
        self._objective = objective
        self._dft_alpha = dft_alpha
        self._transform: LogitTransform | None = None
        self._sums = StepSums(args.device)
        self._clock = Clock()
        self._tokens_logged = 0
        self._tracker_names: dict[str, str] = {}
        self._parameters = count_parameters(model)
        self._layout = train_layout(args)
        self._sampler = train_sampler(train_split, self._layout, self._data_seed) if train_split else None

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
        return self._loader(split, eval_sampler(split, eval_layout(self.args)))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Nothing to count, nothing to gather: each batch carries its step's num_valid_tokens."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        # Trainer's own would cast floats, loss weights among them, to DeepSpeed's 16 bits.
        return inputs.to(self.args.device) if isinstance(inputs, Batch) else super()._prepare_inputs(inputs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 6 * self._parameters * inputs.tokens

    # Loss

    def _probe(self, model: Any) -> LogitTransform:
        half = torch.bfloat16 if self.args.bf16 else torch.float16
        dtype = half if self.args.bf16 or self.args.fp16 else self._plain_model.dtype
        config = self._plain_model.config
        return probe_model(self._tap, model, config, attention=self._attention, device=self.args.device, dtype=dtype)

    def _loss(self, model: Any, batch: Batch, *, num_valid_tokens: float, per_token: bool) -> tuple[Tensor, LossStats]:
        if self._transform is None:
            self._transform = self._probe(model)
        request = LossRequest(
            labels=batch.labels,
            loss_weights=batch.loss_weights,
            num_valid_tokens=num_valid_tokens,
            objective=self._objective,
            dft_alpha=self._dft_alpha,
            softcap=self._transform.softcap,
            logit_scale=self._transform.logit_scale,
            per_token=per_token,
        )
        return self._tap.loss(model, batch.inputs, request)  # pyright: ignore[reportArgumentType]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss, times the number of ranks: they average their gradients."""
        loss, stats = self._loss(model, inputs, num_valid_tokens=max(inputs.num_valid_tokens, 1), per_token=False)
        self._sums.add(stats)
        return loss * self.args.world_size

    # Metrics

    def _reduce(self, sums: Tensor) -> Tensor:
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def _training_metrics(self) -> dict[str, float]:
        """The numbers since the last log line: one collective."""
        assert isinstance(self.train_dataset, PackedSplit) and self._sampler is not None
        metrics = ratios(self._sums.total(self._reduce))
        self._sums.clear()
        seen = tokens_before(self.train_dataset, self._sampler, self.state.global_step)
        metrics |= {"dft_alpha": self._dft_alpha, "tokens_seen": seen}
        metrics["tokens_per_second"] = (seen - self._tokens_logged) / self._clock.mark()
        self._tokens_logged = seen
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Into trainer_state.json with plain names, and to the trackers with a source as a folder of its own."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self._training_metrics())
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        shown = {self._tracker_names.get(name, name): value for name, value in logs.items()}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, shown)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._clock.mark()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        # The steps since the last log line: Trainer would take rank 0's part for the mean.
        self._tr_loss = self._reduce(self._tr_loss) / self.args.world_size
        return super()._finalize_training(trial, num_train_samples, start_time)

    # Evaluation

    def _model_for_evaluation(self) -> Any:
        if self.is_deepspeed_enabled and self.deepspeed is None:
            deepspeed_init(self, num_training_steps=0, inference=True)
        if self.model_wrapped is self.model:
            if self.is_deepspeed_enabled:
                self.model_wrapped = self.deepspeed = self.accelerator.prepare(self._plain_model)
            else:
                self.model_wrapped = self.accelerator.prepare_model(self._plain_model, evaluation_mode=True)
        return self.model_wrapped if self.is_deepspeed_enabled else self._plain_model

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
            for batch in self.get_eval_dataloader(split):
                batch = batch.to(self.args.device)
                _, stats = self._loss(model, batch, num_valid_tokens=1.0, per_token=True)
                assert stats.tokens is not None
                # A label stands one place after the token that predicts it; within a slice both are of one source.
                sums.add(stats.tokens, batch.source_ids.reshape(-1))
        overall, by_source = sums.metrics(self._reduce)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in overall.items()}
        for source, numbers in by_source.items():
            for name, value in numbers.items():
                key = f"{metric_key_prefix}_{source}_{name}"
                metrics[key] = value
                self._tracker_names[key] = f"{metric_key_prefix}_{source}/{name}"
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
        )

    def restore(self, state: RunState, step: int) -> None:
        """Take up the sums of a checkpoint made at `step`; before `train`."""
        assert isinstance(self.train_dataset, PackedSplit) and self._sampler is not None
        if self.is_world_process_zero():
            self._sums.add_sums(state.unlogged)
        self._tokens_logged = tokens_before(self.train_dataset, self._sampler, step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        start = time.monotonic()
        unlogged = self._sums.total(self._reduce)
        # First, and so before an older checkpoint is removed: a checkpoint without it cannot be resumed.
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            directory.mkdir(parents=True, exist_ok=True)
            write_state(directory, self.run_state(unlogged))
        super()._save_checkpoint(model, trial)
        self._clock.add_pause(time.monotonic() - start)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights as safetensors, configuration, tokenizer: what `from_pretrained` loads, and no pickle."""
        if not self.args.should_save:
            return
        directory = Path(str(output_dir or self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        self._plain_model.save_pretrained(directory, state_dict=state_dict, is_main_process=True)
        # Not saved with a model whose code lacks transformers' generate.
        self._plain_model.generation_config.save_pretrained(directory)
        copy_tokenizer(self._dataset_dir, directory)
