"""A checkpoint has its name only when it is whole; what is not whole is recognised; the best and the last one stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dft_train.checkpoints import whole as checkpoints
from dft_train.checkpoints.whole import (
    Contents,
    checkpoints_in,
    entries_of,
    files_in,
    publish,
    rotate,
    share_of,
    sweep,
    what_is_damaged,
    what_is_missing,
)

FILES = {
    "model.safetensors": b"weights" * 1000,
    "trainer_state.json": b"{}",
    "global_step6/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"0" * 3000,
    "global_step6/zero_pp_rank_1_mp_rank_00_optim_states.pt": b"1" * 2000,
}


def fill(directory: Path) -> Contents:
    for name, data in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return Contents(files=entries_of(directory, files_in(directory)))


def write(output_dir: Path, step: int, age: int = 0) -> Path:
    temporary = output_dir / f".saving-checkpoint-{step}"
    checkpoint = output_dir / f"checkpoint-{step}"
    publish(temporary, checkpoint, fill(temporary))
    os.utime(checkpoint / checkpoints.CONTENTS_NAME, (1e9 - age, 1e9 - age))
    return checkpoint


def names(output_dir: Path) -> list[str]:
    return [path.name for path in checkpoints_in(output_dir)]


def test_a_written_one_is_whole_and_nothing_hidden_is_left(tmp_path):
    checkpoint = write(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert what_is_missing(checkpoint) is None and what_is_damaged(checkpoint) is None
    assert sorted(FILES) == files_in(checkpoint)


@pytest.mark.parametrize("name", [*FILES, checkpoints.CONTENTS_NAME])
def test_a_missing_a_shortened_and_a_changed_file_are_named(tmp_path, name):
    checkpoint = write(tmp_path, 6)
    path = checkpoint / name
    data = path.read_bytes()
    path.unlink()
    assert name in (what_is_missing(checkpoint) or "")
    path.write_bytes(data[:-2])
    assert name in (what_is_missing(checkpoint) or "")
    if name != checkpoints.CONTENTS_NAME:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert what_is_missing(checkpoint) is None
        assert name in (what_is_damaged(checkpoint) or "")


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_ranks_together_read_every_file_once(tmp_path, ranks):
    checkpoint = write(tmp_path, 6)
    (checkpoint / "trainer_state.json").write_bytes(b"[]")
    found = [what_is_damaged(checkpoint, rank, ranks) for rank in range(ranks)]
    assert len([problem for problem in found if problem]) == 1
    shares = [share_of([*FILES, "rng_state_1.pth"], rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted([*FILES, "rng_state_1.pth"])
    if ranks > 1:
        assert {"rng_state_1.pth", "global_step6/zero_pp_rank_1_mp_rank_00_optim_states.pt"} == set(shares[1])


def test_wherever_a_save_is_killed_the_older_checkpoint_or_the_newer_one_is_there(tmp_path, monkeypatch):
    """Every step that changes the directory is taken away in turn, with all that would have come after it."""

    class Killed(BaseException):
        pass

    for kill_at in range(20):
        output_dir = tmp_path / str(kill_at)
        write(output_dir, 3)
        write(output_dir, 6)
        left = [kill_at]

        def counted(real, left=left):
            def step(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            return step

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                newest = write(output_dir, 6)
                rotate(output_dir, 1, newest=newest, best=None)
                finished = True
            except Killed:
                finished = False
        sweep(output_dir)
        assert all(what_is_missing(path) is None for path in checkpoints_in(output_dir))
        assert "checkpoint-6" in names(output_dir)
        assert not [path for path in output_dir.iterdir() if path.name.startswith(".")]
        if finished:
            assert names(output_dir) == ["checkpoint-6"]
            return
    raise AssertionError("never finished")


def test_what_a_killed_save_left_is_removed_but_one_that_lacked_only_its_name_is_kept(tmp_path):
    half, whole = tmp_path / ".saving-checkpoint-9", tmp_path / ".saving-checkpoint-6"
    fill(half)
    write(tmp_path, 6).rename(whole)
    write(tmp_path, 3).rename(tmp_path / ".removing-checkpoint-3")
    (tmp_path / "notes.txt").write_text("mine")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "notes.txt"]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [2, 4, 6, 8]),
        (1, None, [8]),
        (2, None, [6, 8]),
        (1, 4, [4, 8]),
        (2, 4, [4, 8]),
        (3, 2, [2, 6, 8]),
        (1, 8, [8]),
        (9, 2, [2, 4, 6, 8]),
    ],
)
def test_the_oldest_go_never_the_best_nor_the_newest(tmp_path, limit, best, kept):
    for step in (2, 4, 6, 8):
        write(tmp_path, step, age=10 - step)
    rotate(
        tmp_path,
        limit,
        newest=tmp_path / "checkpoint-8",
        best=tmp_path / f"checkpoint-{best}" if best else None,
    )
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_a_damaged_one_is_neither_counted_nor_removed(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step, age=10 - step)
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    rotate(tmp_path, 1, newest=tmp_path / "checkpoint-6", best=None)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_of_a_branch_left_behind_the_older_go_first_whatever_their_steps(tmp_path):
    """A run that went on from checkpoint-3 while 6 and 9 were there: its own are the newer ones."""
    for step, age in ((3, 5), (6, 4), (9, 3), (4, 2), (5, 1)):
        write(tmp_path, step, age=age)
    rotate(tmp_path, 2, newest=tmp_path / "checkpoint-5", best=None)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]
