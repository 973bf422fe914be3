"""LoRA adapters through peft: put into a model, found again in a directory, saved, merged. Called by `load`,
`loop` and `export`'s callers.

peft replaces the target layers inside the model by layers that hold the old one (`base_layer`) and two small
matrices; the model itself stays the object that it was, so the loss works on it as on any other. Its weights are
frozen, the head's too: nothing of its gradient is computed.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from dft_common.errors import SetupError
from dft_common.logs import get_logger
from dft_common.manifest import Manifest
from dft_train.settings.arguments import Settings
from dft_train.settings.lora_flags import ALL_LINEAR, LoraSettings, base_of_adapter
from dft_train.weights.export import Source, as_it_is, saved_tensors, whole_shape, write_weights
from dft_train.weights.weight_plan import Convert

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER = "default"
_BASE = re.compile(r"(\.base_layer)+\.")


def import_peft() -> Any:
    """The package. Raises SetupError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise SetupError(
            "LoRA needs the package peft, which is not installed", remedy="run `pip install 'dft-toolkit[lora]'`"
        ) from None
    return peft


def is_adapted(model: Any) -> bool:
    """Whether `adapt` or `load_adapter` made `model`."""
    return hasattr(model, "peft_config")


def plain_model(model: Any) -> PreTrainedModel:
    """The model that holds the adapters, or `model` itself where it has none."""
    return model.get_base_model() if is_adapted(model) else model


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _name_of(model: nn.Module, wanted: Any) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _all_linear(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers but the head. The experts of a mixture are none: they stay as they are."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def _refuse_untrained_tokens(model: PreTrainedModel, lora: LoraSettings, manifest: Manifest) -> None:
    """Tokens that the build added begin as the mean of the others: their rows must be trained."""
    layers: list[Any] = [model.get_input_embeddings()]
    if not _is_tied(model):
        layers.append(model.get_output_embeddings())
    names = [_name_of(model, layer).rpartition(".")[2] for layer in layers]
    missing = [name for name in names if name not in {saved.rpartition(".")[2] for saved in lora.modules_to_save}]
    if manifest.tokenizer.added_tokens and missing:
        raise SetupError(
            f"the dataset's tokenizer has added tokens ({' '.join(manifest.tokenizer.added_tokens)}), whose rows in "
            f"{', '.join(missing)} would stay untrained with LoRA",
            remedy=f"train these layers whole: `--lora_modules_to_save {' '.join(names)}`; or train without --lora_r",
        )


def _refuse_bad_targets(model: PreTrainedModel, lora: LoraSettings) -> None:
    head = _name_of(model, model.get_output_embeddings())
    modules = dict(model.named_modules())
    for flag, wanted in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
        for end in wanted:
            found = [name for name in modules if name == end or name.endswith(f".{end}")]
            if not found and end != ALL_LINEAR:
                linear = sorted({name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear)})
                raise SetupError(
                    f"--lora_{flag} {end}: the model has no such layer", remedy=f"linear layers: {', '.join(linear)}"
                )
            if flag == "target_modules" and head in found:
                raise SetupError(
                    f"--lora_target_modules {end}: this is the head, in which the loss is computed without its logits",
                    remedy=f"leave it out, or train it whole: `--lora_modules_to_save {end}`",
                )


def adapt(model: PreTrainedModel, lora: LoraSettings, manifest: Manifest, seed: int) -> Any:
    """`model` with fresh adapters, its own weights frozen, as peft's PeftModel. Raises SetupError."""
    peft = import_peft()
    _refuse_untrained_tokens(model, lora, manifest)
    _refuse_bad_targets(model, lora)
    options: dict[str, Any] = {}
    if lora.modules_to_save and _is_tied(model):
        # One matrix before and after; without it, peft would train a copy of it on one side alone.
        options["ensure_weight_tying"] = True
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_all_linear(model) if lora.target_modules == (ALL_LINEAR,) else list(lora.target_modules),
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.rslora,
        **options,
    )
    # The matrices begin at random: as the seed has it, whatever each rank did before.
    set_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    if Path(directory := str(model.name_or_path)).is_dir():
        # Whoever loads the adapter may do so from anywhere.
        config.base_model_name_or_path = str(Path(directory).resolve())
    _describe(adapted)
    return adapted


def _describe(adapted: Any) -> None:
    sizes = [(whole_shape(parameter).numel(), parameter.requires_grad) for parameter in adapted.parameters()]
    trained, total = sum(size for size, needed in sizes if needed), sum(size for size, _ in sizes)
    get_logger().info(
        "LoRA: %s of %s parameters are trained (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total
    )


def load_adapter(model: PreTrainedModel, directory: str, *, trains: bool) -> Any:
    """`model` with the adapter in `directory`, as PeftModel. Raises SetupError where it is not one of this model."""
    peft = import_peft()
    if not (Path(directory) / ADAPTER_WEIGHTS).is_file():
        raise SetupError(f"{directory}: no {ADAPTER_WEIGHTS}", remedy="adapters are read from safetensors alone")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(model, directory, is_trainable=trains)
    except (ValueError, RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise SetupError(f"{directory}: the adapter cannot be put into its base model: {first}") from None
    if trains:
        _describe(adapted)
    return adapted


def with_adapter(model: PreTrainedModel, settings: Settings, manifest: Manifest, seed: int) -> Any:
    """`model` as it is to be trained or evaluated: with fresh adapters, with those of --model_name_or_path, or as it
    is. Raises SetupError."""
    directory = settings.model_name_or_path
    if base_of_adapter(directory) is not None:
        adapted = load_adapter(model, directory, trains=not settings.eval_only)
    elif settings.lora is not None and not settings.eval_only:
        adapted = adapt(model, settings.lora, manifest, seed)
    else:
        return model
    if settings.gradient_checkpointing:
        # Else nothing that enters the first recomputed layer needs a gradient, and none would be made in it.
        model.enable_input_require_grads()
    return adapted


def inner_head(head: nn.Module) -> nn.Module:
    """The layer that answers: with --lora_modules_to_save peft keeps the old head beside the one that is trained."""
    copies = getattr(head, "modules_to_save", None)
    return head if copies is None else copies[_ADAPTER]


def adapter_config(model: Any) -> Any:
    return model.peft_config[_ADAPTER]


def adapter_sources(model: Any) -> tuple[dict[str, Source], Convert]:
    """What is written of the adapters, and how peft names it."""
    peft = import_peft()
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}

    def choose(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return peft.get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)

    chosen = {id(value) for value in choose(state).values()}
    # A tied matrix twice, as peft has it.
    return {name: as_it_is(value) for name, value in state.items() if id(value) in chosen}, choose


def write_adapter(model: Any, directory: Path, *, engine: Any = None, writes: bool = True) -> None:
    """The adapters and their configuration, as peft's `save_pretrained` writes them. Called by every rank."""
    sources, choose = adapter_sources(model)
    write_weights(sources, choose, directory, engine=engine, writes=writes, shard_size=1 << 62, name=ADAPTER_WEIGHTS)
    if writes:
        config = copy.copy(adapter_config(model))
        config.inference_mode = True
        # A set: its order would change from run to run.
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(directory))


def _merged(layer: Any) -> Source:
    """The weight of a target layer and its adapter in one: W + scaling B A, in float32."""
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    # peft adapts experts, which are no layers but one parameter, with a layer around them.
    whole = hasattr(layer, "parameter_name")
    weight = layer.get_param() if whole else layer.base_layer.weight

    def read() -> Tensor:
        if whole:
            return (weight.float() + layer.get_delta_weight(_ADAPTER).float()).to(weight.dtype)
        delta = (b.float() @ a.float()) * layer.scaling[_ADAPTER]
        return (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)

    return Source((weight, a, b), whole_shape(weight), weight.dtype, read)


def _plain_name(name: str) -> str:
    """The name in the model of what peft calls `name`."""
    return _BASE.sub(".", name).replace(f".modules_to_save.{_ADAPTER}.", ".")


def merged_sources(model: Any) -> dict[str, Source]:
    """What `export.write_model` writes of the model with its adapters merged in; the model stays as it is."""
    plain = plain_model(model)
    state = {
        _plain_name(name): value
        for name, value in plain.state_dict(keep_vars=True).items()
        if ".lora_" not in name and ".original_module." not in name
    }
    merged = {
        _plain_name(f"{name}.{getattr(layer, 'parameter_name', 'weight')}"): layer
        for name, layer in plain.named_modules()
        if hasattr(layer, "lora_A")
    }
    return {
        name: _merged(merged[name]) if name in merged else as_it_is(value)
        for name, value in saved_tensors(plain, state).items()
    }
