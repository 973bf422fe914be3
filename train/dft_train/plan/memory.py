"""Predicts the peak memory of one device by part, before anything is allocated. Called by `plan`.

What lies there all the time (weights, gradients, optimizer) follows from the number of parameters, the precision
and ZeRO's stage: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054, section
3), and DeepSpeed's own buffers from its configuration (deepspeed/runtime/zero: stage_1_and_2.py, stage3.py, and
config.py for the defaults). What a micro-batch adds is counted by `shape`. A step has three moments that can be
its peak, and the largest is the prediction:

    loss        all activations are kept, and the loss has its scratch and the float32 gradient of the head
    backward    every gradient is there, and one layer's activations with the gradient in flight
    optimizer   every gradient is there, DeepSpeed's in float32
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from dft_train.plan.shape import ModelShape
from dft_train.three_products import BLOCK_ELEMENTS, GROUP_ELEMENTS, TILE_ELEMENTS

PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")
_FLOAT32 = 4
_MOMENTS = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "lion_32bit": 4, "adamw_bnb_8bit": 2, "adamw_8bit": 2}
"""Bytes that an optimizer keeps for each parameter; those not named keep Adam's two moments in float32."""
_ADAM = 8
_DENSE_SCRATCH = 4
"""Tensors of [tokens, vocabulary] float32 of the dense loss: logits, their log-softmax, and both gradients."""
_BIG = 1_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRequest:
    """What the prediction depends on."""

    shape: ModelShape
    """Of the model, measured with the tokens of the largest micro-batch."""
    live: int
    """Trained labels of the largest micro-batch."""
    world_size: int
    weight_bytes: int
    """Of a parameter as the model holds it: 4, or 2."""
    checkpointing: bool
    accumulates: bool
    """Whether gradients of earlier micro-batches are there when a later one is computed."""
    device: str = "cpu"
    """Its type, as torch calls it."""
    optimizer: str = "adamw_torch"
    fused_loss: bool = True
    deepspeed: Mapping[str, Any] | None = None
    """DeepSpeed's configuration, None without it."""


class MemoryPlan(NamedTuple):
    """Bytes on one device at the moment of its peak, by part, and what is offloaded to the host for each rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    buffers: float
    """DeepSpeed's (reduce buckets, gathered parameters) or DDP's buckets."""
    moment: str
    """When: loss, backward or optimizer."""
    host: float

    @property
    def total(self) -> float:
        return sum(self[: len(PARTS)])  # pyright: ignore[reportArgumentType, reportCallIssue]


class _Standing(NamedTuple):
    """What lies there all the time, in bytes; `step_gradients` when the optimizer works."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    step_gradients: float
    host: float


def zero_section(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (config or {}).get("zero_optimization", {})


def _offloaded(zero: Mapping[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") not in ("none", None)


def _number(zero: Mapping[str, Any], name: str, default: float, auto: float) -> float:
    """A setting in elements; transformers fills "auto" from the hidden size."""
    value = zero.get(name, default)
    return auto if value == "auto" else float(value)


def _bucket(zero: Mapping[str, Any], hidden_size: int) -> float:
    return _number(zero, "reduce_bucket_size", 5e8, hidden_size**2)


def _plain(request: MemoryRequest) -> _Standing:
    """One device, or DDP, whose buckets are a second copy of the gradients."""
    shape, size = request.shape, request.weight_bytes
    gradients = shape.trainable * size
    return _Standing(
        weights=shape.parameters * size,
        gradients=gradients,
        optimizer=shape.trainable * _MOMENTS.get(request.optimizer, _ADAM) * size / _FLOAT32,
        buffers=gradients if request.world_size > 1 else 0.0,
        step_gradients=gradients,
        host=0.0,
    )


def _states(request: MemoryRequest) -> float:
    """Of DeepSpeed's optimizer for each trained parameter: the moments, and a float32 copy of the parameter."""
    return _MOMENTS.get(request.optimizer, _ADAM) + _FLOAT32


def _sharded_states(request: MemoryRequest, zero: Mapping[str, Any]) -> _Standing:
    """ZeRO-1 and 2, and DeepSpeed without ZeRO: whole weights."""
    shape, size, ranks = request.shape, request.weight_bytes, request.world_size
    stage = int(zero.get("stage", 0))
    states = shape.trainable * _states(request) / (ranks if stage else 1)
    part = shape.trainable / (ranks if stage >= 2 else 1)
    copies = 2 if zero.get("overlap_comm", False) else 1
    offload = stage > 0 and _offloaded(zero, "offload_optimizer")
    bucket = min(_bucket(zero, shape.hidden_size), shape.trainable) * size * copies if stage else 0.0
    return _Standing(
        weights=shape.parameters * size,
        gradients=0.0 if offload else part * size,
        optimizer=0.0 if offload else states,
        buffers=bucket,
        step_gradients=0.0 if offload else part * size + shape.trainable * _FLOAT32 / (ranks if stage else 1),
        host=states + shape.trainable * _FLOAT32 / ranks if offload else 0.0,
    )


def _sharded_weights(request: MemoryRequest, zero: Mapping[str, Any]) -> _Standing:
    """ZeRO-3: a part of everything, and as many gathered parameters as the configuration lets live."""
    shape, size, ranks = request.shape, request.weight_bytes, request.world_size
    own, trained = shape.parameters / ranks, shape.trainable / ranks
    prefetch = _number(zero, "stage3_prefetch_bucket_size", 5e7, 0.9 * shape.hidden_size**2)
    most = min(
        _number(zero, "stage3_max_live_parameters", _BIG, _BIG), _number(zero, "stage3_max_reuse_distance", _BIG, _BIG)
    )
    least = max(shape.largest_layer, shape.head, shape.embeddings) + prefetch
    gathered = min(shape.parameters, max(most, least))
    states, gradients = trained * _states(request), trained * size
    sub_group = min(trained, _number(zero, "sub_group_size", _BIG, _BIG)) * _FLOAT32
    away, weights_away = _offloaded(zero, "offload_optimizer"), _offloaded(zero, "offload_param")
    host = (states + gradients + sub_group if away else 0.0) + (own * size if weights_away else 0.0)
    return _Standing(
        weights=0.0 if weights_away else own * size,
        gradients=0.0 if away else gradients,
        optimizer=0.0 if away else states,
        buffers=(min(_bucket(zero, shape.hidden_size), shape.trainable) + (gathered if ranks > 1 else 0)) * size,
        step_gradients=0.0 if away else gradients + sub_group,
        host=host,
    )


def _standing(request: MemoryRequest) -> _Standing:
    if request.deepspeed is None:
        return _plain(request)
    zero = zero_section(request.deepspeed)
    return (_sharded_weights if zero.get("stage") == 3 else _sharded_states)(request, zero)


def _loss_bytes(request: MemoryRequest) -> float:
    """Gradients of the live rows and of the head in float32, and scratch for logits (`three_products`)."""
    shape, device = request.shape, "cpu" if request.device == "cpu" else "cuda"
    rows = request.live * shape.hidden_size * (request.weight_bytes + _FLOAT32)
    head = shape.vocabulary * shape.hidden_size * _FLOAT32 if shape.head_trainable else 0
    logits = request.live * shape.vocabulary
    if not request.fused_loss:
        # Dead rows have logits too; the head's float32 copy, where it is not in float32.
        copy = head if request.weight_bytes < _FLOAT32 else 0
        return rows + head + copy + _DENSE_SCRATCH * shape.tokens * shape.vocabulary * _FLOAT32
    tile, group = min(TILE_ELEMENTS[device], logits), min(GROUP_ELEMENTS[device], logits)
    halves = device == "cuda" and request.weight_bytes < _FLOAT32
    block = min(BLOCK_ELEMENTS, shape.head) * _FLOAT32 if request.weight_bytes < _FLOAT32 and not halves else 0
    return rows + head + block + tile * (_FLOAT32 + 2 * halves) + group * _FLOAT32


def predict(request: MemoryRequest) -> MemoryPlan:
    """The peak of one device, by part."""
    shape, standing = request.shape, _standing(request)
    kept = shape.layers * shape.layer_input if request.checkpointing else shape.kept_by_layers
    one_layer = shape.kept_by_largest_layer + shape.largest_kept
    keeps_gradients = request.accumulates or request.deepspeed is not None
    moments = {
        # gradients, activations, loss
        "loss": (standing.gradients if keeps_gradients else 0.0, kept + shape.kept_elsewhere, _loss_bytes(request)),
        "backward": (standing.gradients, one_layer + (kept / shape.layers if request.checkpointing else 0), 0.0),
        "optimizer": (standing.step_gradients, 0.0, 0.0),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations, loss = moments[moment]
    return MemoryPlan(
        weights=standing.weights,
        gradients=gradients,
        optimizer=standing.optimizer,
        activations=activations,
        loss=loss,
        buffers=standing.buffers,
        moment=moment,
        host=standing.host,
    )
