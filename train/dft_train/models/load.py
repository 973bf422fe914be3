"""Loads the model to be trained, and makes it fit the dataset's tokenizer. Called by `trainer` and `plan`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, TrainingArguments, set_seed

from dft_common.errors import SetupError
from dft_common.fingerprint import load_tokenizer_json, tokenizer_meaning
from dft_common.logs import get_logger
from dft_common.manifest import Manifest
from dft_common.schema import TOKENIZER_DIR
from dft_train.models.recurrent import reset_states
from dft_train.ranks import launch
from dft_train.settings.arguments import Settings
from dft_train.settings.checks import TOKENIZER_JSON
from dft_train.settings.lora_flags import base_of_adapter

NOISE = 0.01
"""Of the spread of the other rows: how far a new row begins from their mean."""


def choose_dtype(settings: Settings, args: TrainingArguments) -> torch.dtype | str:
    """Of the weights as loaded: --torch_dtype, else DeepSpeed's own precision, else float32."""
    if settings.torch_dtype is not None:
        return "auto" if settings.torch_dtype == "auto" else getattr(torch, settings.torch_dtype)
    if args.deepspeed and (args.bf16 or args.fp16):
        return torch.bfloat16 if args.bf16 else torch.float16
    return torch.float32


def _check_precision(settings: Settings, args: TrainingArguments, model: PreTrainedModel) -> None:
    """Raises SetupError for weights that loss scaling cannot train; warns of those that lose small updates."""
    if settings.eval_only or args.deepspeed:
        return
    if args.fp16 and model.dtype == torch.float16:
        raise SetupError(
            "--fp16 without DeepSpeed: the weights are float16 too, and torch scales no gradients of float16",
            remedy="use `--torch_dtype float32`, or `--deepspeed`, which keeps a float32 copy",
        )
    if model.dtype in (torch.bfloat16, torch.float16):
        launch.warn(
            "the weights are %s and without DeepSpeed there is no float32 copy: small updates are rounded away "
            "(use --deepspeed, or --torch_dtype float32 --bf16)",
            str(model.dtype).removeprefix("torch."),
        )


def load_model(settings: Settings, args: TrainingArguments, manifest: Manifest, attention: str) -> PreTrainedModel:
    """The model, on the CPU or partitioned over the ranks (ZeRO-3), with a row for each id of the dataset."""
    name = base_of_adapter(settings.model_name_or_path) or settings.model_name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=choose_dtype(settings, args),
            attn_implementation=attention,
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise SetupError(
            f"--model_name_or_path {name}: the model cannot be loaded: {first}",
            remedy="give a causal language model with its weights; --trust_remote_code True where it brings code",
        ) from None
    if settings.lora is None and name == settings.model_name_or_path:
        _check_precision(settings, args, model)
    add_rows(model, manifest, args.seed)
    reset_states(model)
    return model


def _start_rows(weight: torch.Tensor, known: int, seed: int) -> None:
    """Set the rows of `weight` after the first `known`: the mean of those, and noise of a part of their spread.

    In float32, so that in 16 bits too no two rows begin alike. (transformers' own way takes the covariance of the
    embeddings, minutes for a large vocabulary, and noise that 16 bits round away.)
    """
    old = weight[:known]
    mean = old.mean(dim=0, dtype=torch.float32)
    squares = torch.linalg.vector_norm(old, dim=0, dtype=torch.float32) ** 2 / known
    spread = (squares - mean**2).clamp(min=0).sqrt()
    shape = (len(weight) - known, weight.shape[1])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(mean.device)
    weight[known:] = (mean + NOISE * spread * noise).to(weight.dtype)


def add_rows(model: PreTrainedModel, manifest: Manifest, seed: int) -> None:
    """Give the embeddings and the head a row for each id of the dataset; rows that are there stay as they are.

    New rows are the mean of the others and a little noise. Without rows to add, ids that the tokenizer gained have
    rows that padded the vocabulary, and are trained from these.
    """
    needed, known = manifest.tokenizer.vocab_size, model.config.get_text_config().vocab_size
    if needed <= known:
        return
    get_logger().info("embeddings are resized to %s rows for %s", f"{needed:,}", manifest.tokenizer.added_tokens)
    # Trainer seeds only when it is made: without this the rows would depend on what each rank did before.
    set_seed(seed)
    model.resize_token_embeddings(needed, mean_resizing=False)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights: list[Any] = [layer.weight for layer in layers if layer is not None]
    for weight in weights if weights[0] is not weights[-1] else weights[:1]:
        with torch.no_grad(), _gathered(weight):
            _start_rows(weight, known, seed)


def _gathered(weight: Any) -> Any:
    """The whole of `weight` where ZeRO-3 holds it in parts; what is set in it becomes every rank's."""
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)


def end_of_turn_id(dataset_dir: Path, manifest: Manifest) -> int | None:
    """The id of the token that ends an assistant turn, where the template has one."""
    token = manifest.template.end_of_turn
    path = dataset_dir / TOKENIZER_DIR / TOKENIZER_JSON
    if token is None or not path.is_file():
        return None
    return tokenizer_meaning(load_tokenizer_json(path))["vocabulary"].get(token)


def teach_to_stop(model: PreTrainedModel, token_id: int | None) -> None:
    """Let generation end at the end of a turn too, and make sure that there is a generation config to be saved."""
    # Models that bring code may lack the attribute.
    config: Any = getattr(model, "generation_config", None) or GenerationConfig.from_model_config(model.config)
    known = config.eos_token_id
    ids = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if token_id is not None and token_id not in ids:
        ids = list(dict.fromkeys([*ids, token_id]))
        config.eos_token_id = ids if len(ids) > 1 else ids[0]
    model.generation_config = _savable(config)


def _problem(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None


def _savable(config: GenerationConfig) -> GenerationConfig:
    """`config`, or what of it can be saved: loading allows settings at odds, saving refuses them, hours later."""
    if _problem(config) is None:
        return config
    # Most often sampling options without sampling.
    config.do_sample = True
    if (problem := _problem(config)) is None:
        return config
    launch.warn(
        "the model's generation config is at odds with itself, checkpoints get its token ids alone: %s", problem
    )
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(config, name) for name in ids})


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of the whole model, also where ZeRO-3 holds them in parts."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters())
