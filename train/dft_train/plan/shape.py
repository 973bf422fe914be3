"""What a model of a configuration weighs, found without any memory: its parameters, and what a forward pass keeps.

The model is built of tensors that have shapes and no data (torch's FakeTensorMode), so that every architecture
answers for itself: gated or not, windows, experts, an attention's own buffers. What autograd would keep for the
backward pass is counted as the forward pass packs it. Used by `memory`, and `few_layers` by `verify` too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.modeling_layers import GradientCheckpointingLayer

from dft_common.logs import get_logger
from dft_train.data.collate import FLASH

MEASURED_LAYERS = 8
"""Of a deeper model so many layers are run (two periods of the usual patterns of layers) and the rest reckoned."""
_FLASH_SHAPE = "dft_varlen_shape"
"""Without "flash" in it, for which transformers would look for a kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Counts of parameters, and bytes that one micro-batch's forward pass keeps for its backward pass."""

    parameters: int
    trainable: int
    largest_layer: int
    """Parameters of the largest decoder layer."""
    embeddings: int
    """Parameters of the input embeddings."""
    head: int
    """Parameters of the output head, counted also where they are the embeddings'."""
    head_trainable: bool
    vocabulary: int
    hidden_size: int
    layers: int
    tokens: int
    """Of the micro-batch."""
    followed: bool
    """Whether the forward pass could be followed; where not, all that it keeps counts 0."""
    kept_by_layers: int
    """Bytes, all layers together, without gradient checkpointing."""
    kept_by_largest_layer: int
    """Bytes."""
    kept_elsewhere: int
    """Bytes: before the first layer and after the last, the head and the loss left out."""
    largest_kept: int
    """Bytes of the largest single tensor that a layer keeps: its gradient is in flight on the way back."""
    layer_input: int
    """Bytes of one layer's input: all that gradient checkpointing keeps of a layer."""


def few_layers(config: Any, layers: int) -> Any:
    """A copy of a model's configuration with its first `layers` layers (all of them where it has no more)."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    layers = min(layers, text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return small


class _FlashShape(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, the result, and a float32 number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _flash_shape(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
    return _FlashShape.apply(query, key, value).transpose(1, 2), None  # pyright: ignore[reportOptionalMemberAccess]


AttentionInterface.register(_FLASH_SHAPE, _flash_shape)
AttentionMaskInterface.register(_FLASH_SHAPE, lambda *_, **__: None)


@contextlib.contextmanager
def _without_partitions() -> Iterator[None]:
    """Where ZeRO-3 is configured, transformers parts every model that it makes over the ranks: not these."""
    known = deepspeed_integration.deepspeed_config()
    reference = getattr(deepspeed_integration, "_hf_deepspeed_config_weak_ref", None)
    owner = reference() if reference is not None else None
    if known is not None:
        deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if owner is not None:
            deepspeed_integration.set_hf_deepspeed_config(owner)


def _build(config: Any, attention: str, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    return AutoModelForCausalLM.from_config(
        config,
        attn_implementation=_FLASH_SHAPE if attention == FLASH else attention,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


def _mask(attention: str, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The mask of packed conversations, as transformers makes it: booleans for sdpa, numbers to add for eager."""
    if attention == FLASH:
        return {}
    kind = torch.bool if attention == "sdpa" else dtype
    return {"attention_mask": torch.ones((1, 1, tokens, tokens), dtype=kind)}


@contextlib.contextmanager
def _names_of_layers(model: nn.Module) -> Iterator[list[int | None]]:
    """A list whose only item is the number of the decoder layer that is running, None outside of them."""
    running: list[int | None] = [None]

    def enter(number: int) -> Callable[..., None]:
        return lambda *_: running.__setitem__(0, number)

    layers = decoder_layers(model)
    handles = [layer.register_forward_pre_hook(enter(at)) for at, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(lambda *_: running.__setitem__(0, None)) for layer in layers]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that gradient checkpointing works on."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _kept(model: nn.Module, inputs: dict[str, Tensor], autocast: torch.dtype | None) -> dict[int | None, list[int]]:
    """Sizes in bytes of what is kept for the backward pass, by number of layer; None: outside of the layers.

    The head sees one token.
    """
    storages = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, Any] = {}
    sizes: dict[int | None, list[int]] = {}
    with _names_of_layers(model) as running:

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in storages and storage._cdata not in held:
                # Held, so that its number is not given to another.
                held[storage._cdata] = storage
                sizes.setdefault(running[0], []).append(storage.nbytes())
            return tensor

        mixed = torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
            model(**inputs, use_cache=False, logits_to_keep=1)
    return sizes


def _size(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def _on_cpu(model: nn.Module) -> None:
    """Put CPU tensors (without data, in a FakeTensorMode) in the place of all that is on the meta device."""
    made: dict[int, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return made[id(tensor)]

    for module in list(model.modules()):
        tables: tuple[Any, ...] = (module._parameters, module._buffers)
        for own in tables:
            own.update({name: twin(tensor) for name, tensor in own.items() if tensor is not None})


def _followed(
    build: Callable[[torch.dtype], Any], attention: str, tokens: int, dtype: torch.dtype, autocast: torch.dtype | None
) -> tuple[dict[int | None, list[int]], int]:
    """(what one forward pass keeps, in bytes; decoder layers that it went through)."""
    model = build(dtype).train()
    with FakeTensorMode(), torch.device("cpu"):
        _on_cpu(model)
        ids = torch.zeros((1, tokens), dtype=torch.int64)
        inputs = {"input_ids": ids, "position_ids": ids, **_mask(attention, tokens, autocast or dtype)}
        return _kept(model, inputs, autocast), len(decoder_layers(model))


def _follow(
    build: Callable[[torch.dtype], Any], attention: str, tokens: int, dtype: torch.dtype, autocast: torch.dtype | None
) -> tuple[dict[int | None, list[int]], int] | None:
    """`_followed`, or None for a model whose forward pass needs real numbers."""
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    level = torchs.level
    torchs.setLevel(logging.CRITICAL)
    try:
        return _followed(build, attention, tokens, dtype, autocast)
    except Exception as error:
        get_logger().debug("the forward pass cannot be followed in %s: %s", dtype, error)
    finally:
        torchs.setLevel(level)
    if dtype is torch.float32 and autocast is None:
        # Without numbers, torch knows the grouped products of experts in bfloat16 alone: half the bytes.
        found = _follow(build, attention, tokens, torch.bfloat16, None)
        return found and ({layer: [2 * size for size in sizes] for layer, sizes in found[0].items()}, found[1])
    return None


def count_parameters(config: Any, trust_remote_code: bool = False) -> int:
    """Parameters of a model of `config`; no weights are made."""
    with _without_partitions(), torch.device("meta"):
        return _size(_build(config, "eager", torch.float32, trust_remote_code))


def measure(
    config: Any,
    *,
    attention: str,
    dtype: torch.dtype,
    tokens: int,
    autocast: torch.dtype | None = None,
    trust_remote_code: bool = False,
    adapt: Callable[[Any], Any] = lambda model: model,
) -> ModelShape:
    """The shape of a model of `config` on a micro-batch of `tokens` tokens. No weights are made.

    dtype: of the weights. autocast: the 16 bits that float32 weights compute in, if they do. adapt: what makes of the
    model the one that is trained (an adapter's parameters added, others frozen).
    """

    def build(config: Any, dtype: torch.dtype) -> Any:
        with _without_partitions(), torch.device("meta"):
            return adapt(_build(config, attention, dtype, trust_remote_code))

    whole, small = build(config, dtype), few_layers(config, MEASURED_LAYERS)
    kept, measured = _follow(partial(build, small), attention, tokens, dtype, autocast) or ({}, 0)
    by_layer = [sizes for layer, sizes in kept.items() if layer is not None] or [[0]]
    layers = len(decoder_layers(whole)) or config.get_text_config().num_hidden_layers
    head = whole.get_output_embeddings()
    return ModelShape(
        parameters=_size(whole),
        trainable=sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad),
        largest_layer=max(map(_size, decoder_layers(whole)), default=_size(whole)),
        embeddings=_size(whole.get_input_embeddings()),
        head=_size(head),
        head_trainable=any(parameter.requires_grad for parameter in head.parameters()),
        vocabulary=head.weight.shape[0],
        hidden_size=head.weight.shape[1],
        layers=layers,
        tokens=tokens,
        followed=bool(kept),
        kept_by_layers=sum(map(sum, by_layer)) * layers // max(measured, 1),
        kept_by_largest_layer=max(map(sum, by_layer)),
        kept_elsewhere=sum(kept.get(None, ())),
        largest_kept=max(map(max, by_layer)),
        layer_input=tokens * head.weight.shape[1] * dtype.itemsize,
    )
