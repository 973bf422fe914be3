"""ZeRO's flat parts, joined by parameter: against files written by hand as DeepSpeed lays them out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dft_common.errors import DataError
from dft_train.checkpoints.reshard import WEIGHT, Source, _optimizer_state, _Place

SHAPES = [{"a": torch.Size((3, 5)), "b": torch.Size((7,))}, {"c": torch.Size((2,)), "d": torch.Size((4, 4))}]


def values(key: str) -> dict[str, torch.Tensor]:
    """Every parameter's own numbers, flat."""
    generator = torch.Generator().manual_seed({WEIGHT: 1, "exp_avg": 2, "exp_avg_sq": 3}[key])
    return {name: torch.rand(shape.numel(), generator=generator) for group in SHAPES for name, shape in group.items()}


def flat_part(stage: int, group: dict[str, torch.Size], key: str, rank: int, ranks: int) -> tuple[torch.Tensor, dict]:
    """(this rank's part of a group, name -> where it lies in it); as long on every rank, zeros at the end."""
    numbers = values(key)
    if stage == 3:
        parts = []
        for name in group:
            part = -(-len(numbers[name]) // ranks)
            padded = torch.zeros(part * ranks)
            padded[: len(numbers[name])] = numbers[name]
            parts.append(padded[rank * part : (rank + 1) * part])
        return torch.cat(parts), {}
    joined = torch.cat([numbers[name] for name in group])
    size = -(-len(joined) // ranks)
    padded = torch.zeros(size * ranks)
    padded[: len(joined)] = joined
    where, at = {}, 0
    for name in group:
        first, last = max(at, rank * size), min(at + len(numbers[name]), (rank + 1) * size)
        if first < last:
            where[name] = SimpleNamespace(start=first - rank * size, numel=last - first)
        at += len(numbers[name])
    return padded[rank * size : (rank + 1) * size], where


def write(directory: Path, stage: int, ranks: int) -> Path:
    for rank in range(ranks):
        state = {}
        for at, group in enumerate(SHAPES):
            moments = {key: flat_part(stage, group, key, rank, ranks)[0] for key in ("exp_avg", "exp_avg_sq")}
            state[at] = {**moments, "step": torch.tensor(5.0)}
        weights = [flat_part(stage, group, WEIGHT, rank, ranks) for group in SHAPES]
        base = {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]}
        head = {"zero_stage": stage, "loss_scaler": None, "dynamic_loss_scale": False, "overflow": False}
        flats = [flat for flat, _ in weights]
        names = ("optimizer_state_dict", "fp32_flat_groups") if stage == 3 else (
            "base_optimizer_state", "single_partition_of_fp32_groups"
        )  # fmt: skip
        own = {**head, names[0]: base, names[1]: flats, "param_slice_mappings": [where for _, where in weights]}
        path = directory / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": own}, path)
    torch.save({"param_shapes": SHAPES}, directory / "mp_rank_00_model_states.pt")
    return directory


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_joined_parts_are_the_parameters(stage, ranks, tmp_path):
    source = Source(write(tmp_path, stage, ranks))
    assert (source.ranks, source.stage) == (ranks, stage)
    for key in (WEIGHT, "exp_avg", "exp_avg_sq"):
        for name, expected in values(key).items():
            assert torch.equal(source.whole(name, key), expected)


def test_each_group_counts_its_own_steps(tmp_path):
    """torch's optimizers count in place: a shared count would go up once for every group."""
    source = Source(write(tmp_path, 3, 2))
    groups = [(torch.zeros(8), [_Place("b", 1, 0, 7)]), (torch.zeros(10), [_Place("d", 0, 4, 10)])]
    made = _optimizer_state(source, groups, {"param_groups": [{"params": [0]}, {"params": [1]}]})
    first, second = made["state"][0], made["state"][1]
    assert first["step"] is not second["step"] and first["step"] == second["step"] == 5
    assert torch.equal(first["exp_avg"][1:], values("exp_avg")["b"]) and first["exp_avg"][0] == 0
    assert torch.equal(second["exp_avg_sq"], values("exp_avg_sq")["d"][4:14])
    assert [group["lr"] for group in made["param_groups"]] == [0.1, 0.2]


def test_a_missing_part_is_noticed(tmp_path):
    write(tmp_path, 3, 3)
    (tmp_path / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(DataError, match=r"\[0, 2\]"):
        Source(tmp_path)
