"""ZeRO's optimizer states for another number of ranks than wrote them. Called by `checkpointed`.

DeepSpeed keeps float32 weights and moments as flat parts, one a rank. The parts of a checkpoint are joined by
parameter and cut again as the ranks of now hold them: one parameter in memory at a time. ZeRO-1, 2 and 3, with
or without offload to the CPU; between them too. What is read was written by this run, in its output_dir.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dft_common.errors import DataError, SetupError

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
WEIGHT = "weight"
"""The key of the float32 weights, beside the optimizer's own keys (`exp_avg`, `exp_avg_sq`)."""


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _part(numel: int, ranks: int) -> int:
    """Elements of a parameter that each rank of ZeRO-3 holds; the last ranks' may be padding."""
    return -(-numel // ranks)


class Source:
    """The states of a checkpoint by parameter, whichever stage wrote them.

    `groups` maps a parameter's name to its group; `scalars` are what is no tensor of a group's length, `hyper` the
    optimizer's settings of each param group.
    """

    def __init__(self, directory: Path) -> None:
        found = {int(match[1]): path for path in directory.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))}
        if sorted(found) != list(range(len(found))) or not found:
            raise DataError(f"{directory}: optimizer files of ranks {sorted(found)}: some are missing")
        self.ranks = len(found)
        self._states = [_load(found[rank])["optimizer_state_dict"] for rank in range(self.ranks)]
        first = self._states[0]
        self.stage = int(first["zero_stage"])
        self.head = {name: first[name] for name in ("loss_scaler", "dynamic_loss_scale", "overflow")}
        base = self._base(first)
        self.hyper: list[dict[str, Any]] = base["param_groups"]
        model = next(iter(sorted(directory.glob("*_model_states.pt"))))
        self.model = _load(model)
        self.shapes: list[dict[str, torch.Size]] = self.model["param_shapes"]
        self.numels = {name: shape.numel() for group in self.shapes for name, shape in group.items()}
        self._group = {name: at for at, group in enumerate(self.shapes) for name in group}
        self._offsets = self._stage3_offsets() if self.stage == 3 else {}
        self.keys = [WEIGHT, *(key for key in base["state"][0] if self._is_flat(key))] if base["state"] else [WEIGHT]
        self.scalars = {key: value for key, value in base["state"][0].items() if key not in self.keys}

    def _base(self, state: dict[str, Any]) -> dict[str, Any]:
        found = state["optimizer_state_dict" if "optimizer_state_dict" in state else "base_optimizer_state"]
        if not isinstance(found, dict):
            raise SetupError("zero_optimization.elastic_checkpoint in the DeepSpeed file: use false")
        return found

    def _flat(self, rank: int, group: int, key: str) -> Tensor:
        state = self._states[rank]
        if key == WEIGHT:
            return state["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"][group]
        return self._base(state)["state"][group][key]

    def _is_flat(self, key: str) -> bool:
        value = self._flat(0, 0, key)
        return isinstance(value, Tensor) and value.dim() == 1 and value.numel() >= self._flat(0, 0, WEIGHT).numel() > 0

    def _stage3_offsets(self) -> dict[str, int]:
        offsets = {}
        for group in self.shapes:
            at = 0
            for name in group:
                offsets[name] = at
                at += _part(self.numels[name], self.ranks)
        return offsets

    def _pieces(self, name: str, key: str) -> Iterator[Tensor]:
        group, numel = self._group[name], self.numels[name]
        for rank in range(self.ranks):
            if self.stage == 3:
                yield self._flat(rank, group, key).narrow(0, self._offsets[name], _part(numel, self.ranks))
            else:
                address = self._states[rank]["param_slice_mappings"][group].get(name)
                if address is not None:
                    yield self._flat(rank, group, key).narrow(0, address.start, address.numel)

    def whole(self, name: str, key: str) -> Tensor:
        """[elements of the parameter] float32."""
        numel = self.numels[name]
        joined = torch.cat(list(self._pieces(name, key)))
        assert joined.numel() >= numel, (name, joined.numel(), numel)
        return joined[:numel]


class _Place:
    """Where a part of a parameter lies in this rank's flat group: `[start, start + numel)`, from `first` on of it."""

    __slots__ = ("first", "name", "numel", "start")

    def __init__(self, name: str, start: int, first: int, numel: int) -> None:
        self.name, self.start, self.first, self.numel = name, start, first, numel


def _places_of_stage3(engine: Any, group: dict[str, torch.Size]) -> Iterator[_Place]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    at = 0
    for name, shape in group.items():
        part = _part(shape.numel(), ranks)
        first = min(rank * part, shape.numel())
        yield _Place(name, at, first, min(part, shape.numel() - first))
        at += part


def _places_of_stage2(engine: Any, group: int) -> Iterator[_Place]:
    for parameter in engine.optimizer.bit16_groups[group]:
        mapping = parameter._hp_mapping
        if mapping is not None:
            flat, own = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield _Place(engine.param_names[parameter], flat.start, own.start, flat.numel)


def _flat_groups(engine: Any) -> list[tuple[Tensor, list[_Place]]]:
    """This rank's flat float32 weights, by group, with what lies in them."""
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():
        shapes = engine._get_zero_param_shapes()
        return [
            (flat, list(_places_of_stage3(engine, group)))
            for flat, group in zip(optimizer.fp32_partitioned_groups_flat, shapes, strict=True)
        ]
    flats = optimizer.single_partition_of_fp32_groups
    return [(flat, list(_places_of_stage2(engine, at))) for at, flat in enumerate(flats)]


def _cut(source: Source, key: str, flat: Tensor, places: list[_Place]) -> Tensor:
    part = torch.zeros(flat.numel(), dtype=torch.float32)
    for place in places:
        piece = source.whole(place.name, key).narrow(0, place.first, place.numel)
        part.narrow(0, place.start, place.numel).copy_(piece)
    return part


def _optimizer_state(source: Source, groups: list[tuple[Tensor, list[_Place]]], fresh: dict[str, Any]) -> Any:
    """The inner optimizer's state dict, as it would be on this rank; `fresh` is its present one."""
    state = {
        # A copy for each group: the optimizer counts its steps up in place.
        at: copy.deepcopy(source.scalars)
        | {key: _cut(source, key, flat, places) for key in source.keys if key != WEIGHT}
        for at, (flat, places) in enumerate(groups)
    }
    settings = source.hyper
    param_groups = [
        {**settings[min(at, len(settings) - 1)], "params": group["params"]}
        for at, group in enumerate(fresh["param_groups"])
    ]
    return {"state": state, "param_groups": param_groups}


def _check(engine: Any) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    known = isinstance(engine.optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3)
    if not known or engine.zero_nvme_offload_optimizer() or engine.has_moe_layers:
        raise SetupError(
            "this DeepSpeed configuration's optimizer states cannot be parted anew for another number of ranks",
            remedy="resume with as many ranks as wrote the checkpoint, or with ZeRO-1, 2 or 3 without NVMe offload",
        )


def _load_stage3(optimizer: Any, source: Source, groups: list[tuple[Tensor, list[_Place]]]) -> None:
    optimizer._set_fp32_optimizer_param_groups()
    fresh = optimizer.optimizer.state_dict()
    optimizer._clear_fp32_optimizer_param_groups()
    optimizer._rigid_load_state_dict(
        {
            **source.head,
            "optimizer_state_dict": _optimizer_state(source, groups, fresh),
            "fp32_flat_groups": [_cut(source, WEIGHT, flat, places) for flat, places in groups],
        }
    )
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)


def _load_stage2(optimizer: Any, source: Source, groups: list[tuple[Tensor, list[_Place]]]) -> None:
    optimizer.loss_scaler = source.head["loss_scaler"]
    optimizer.dynamic_loss_scale = source.head["dynamic_loss_scale"]
    optimizer.overflow = source.head["overflow"]
    optimizer.optimizer.load_state_dict(_optimizer_state(source, groups, optimizer.optimizer.state_dict()))
    for flat, places in groups:
        flat.data.copy_(_cut(source, WEIGHT, flat, places))
    optimizer.update_lp_params()


def _load_buffers(module: torch.nn.Module, saved: dict[str, Any]) -> None:
    buffers = dict(module.named_buffers())
    for name in saved["buffer_names"]:
        if name in buffers and name in saved["module"]:
            buffers[name].data.copy_(saved["module"][name])


def load_resharded(engine: Any, checkpoint: Path) -> None:
    """Load into a fresh DeepSpeed `engine` what `checkpoint` holds, written by another number of ranks.

    Raises SetupError for a configuration that cannot be, DataError for files that do not belong together.
    """
    _check(engine)
    directory = checkpoint / (checkpoint / "latest").read_text().strip()
    source = Source(directory)
    optimizer = engine.optimizer
    stage3 = engine.zero_optimization_partition_weights()
    if stage3:
        optimizer.checkpoint_event_prologue()
    groups = _flat_groups(engine)
    unknown = {place.name for _, places in groups for place in places} ^ set(source.numels)
    if unknown and dist.get_world_size() == 1:
        raise DataError(f"{directory}: its parameters are not this model's: {sorted(unknown)[:3]}")
    with torch.no_grad():
        (_load_stage3 if stage3 else _load_stage2)(optimizer, source, groups)
        _load_buffers(engine.module, source.model)
    if stage3:
        optimizer.checkpoint_event_epilogue()
    if engine.lr_scheduler is not None and source.model.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(source.model["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, source.model[name])
