"""Trackers for real: files that wandb (offline), swanlab (local), tensorboard and trackio wrote, read back."""

from __future__ import annotations

import errno
import json
import os
import re
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dft_common.errors import SetupError
from dft_train.checkpoints.whole import read_state
from dft_train.metrics.sums import BINS
from dft_train.metrics.trackers import TRACKERS, check_trackers
from train import handmade
from train.rank_server import RankServer

NAMES = (
    "train/loss", "train/ce_loss", "train/avg_p_correct", "train/token_accuracy", "train/effective_weight",
    "train/entropy", "train/dft_alpha", "train/grad_norm", "train/learning_rate", "train/tokens_seen",
    "train/tokens_per_second", "train/mfu", "train/data_wait", "train/peak_memory_gib", "eval/loss", "eval/ce_loss",
    "eval/avg_p_correct", "eval/entropy", "eval/sums/loss", "eval/more/avg_p_correct",
    *(f"train/{name}" for name in BINS),
)  # fmt: skip


def track(directory: Path, dataset: Path, model: Path, ranks: RankServer, *steps: object) -> Path:
    """Run to each of `steps` in turn, from the second on going on from the checkpoint of the second step."""
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(directory / "wandb"),
        "WANDB_SILENT": "true",
        "SWANLAB_MODE": "local",
        "SWANLAB_LOG_DIR": str(directory / "swanlab"),
        "TRACKIO_DIR": str(directory / "trackio"),
    }
    (directory / "wandb").mkdir()
    flags = (
        "--dataset_dir", dataset, "--model_name_or_path", model, "--output_dir", directory / "run",
        "--logging_steps", 1, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--peak_tflops", 0.01,
        "--lr_scheduler_type", "constant", "--report_to", *TRACKERS,
    )  # fmt: skip
    resume: tuple[object, ...] = ()
    for last in steps:
        ranks(1, *flags, "--max_steps", last, *resume, env=environment)
        resume = ("--resume_from_checkpoint", directory / "run/checkpoint-2")
    return directory


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, dataset, qwen3, ranks) -> Path:
    return track(tmp_path_factory.mktemp("tracked"), dataset, qwen3, ranks, 2)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, dataset, qwen3, ranks) -> Path:
    """Three steps, and then two more from the checkpoint of the second, as after a run that was killed."""
    return track(tmp_path_factory.mktemp("resumed"), dataset, qwen3, ranks, 3, 4)


def losses(directory: Path) -> dict[int, float]:
    """By step, as trainer_state.json has them."""
    history = handmade.read_state(directory / "run")["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def tracker_run(directory: Path, name: str) -> str:
    """What the checkpoints know a tracker's run by: all of them the same."""
    found = [read_state(path).tracker_runs for path in (directory / "run").glob("checkpoint-*")]
    assert all(runs == found[0] for runs in found) and set(found[0]) == set(TRACKERS)
    return found[0][name]


def right_names(names: set[str]) -> bool:
    return set(NAMES) <= names and not [name for name in names if name.startswith(("train/train/", "eval/eval"))]


def tensorboard_events(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (written,) = (directory / "run/runs").iterdir()
    assert tracker_run(directory, "tensorboard") == str(written)
    events = EventAccumulator(str(written))
    events.Reload()
    return events


def wandb_records(path: Path) -> Iterator[Any]:
    """Of wandb's own log file: seven bytes, then blocks of 32 KiB with records (checksum, length, kind, content), a
    long one in several parts (kinds: 1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    data, at, content = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(content)
            content = b""


def wandb_entries(directory: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """(ids of runs, what was logged, in order)."""
    records = [record for path in sorted((directory / "wandb").rglob("*.wandb")) for record in wandb_records(path)]
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
    ]
    runs = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    return runs, [entry for entry in history if entry]


def swanlab_runs(directory: Path) -> list[tuple[set[str], list[list[float]]]]:
    """Of each directory of the run: (names, the values of each)."""
    run = tracker_run(directory, "swanlab")
    found = []
    for path in sorted((directory / "swanlab").glob("run-*")):
        names = re.findall(rb"(?:train|eval)/[a-z0-9_/]+", (path / f"run-{run}.swanlab").read_bytes())
        logs = [file.read_text().splitlines() for file in path.glob("logs/*/*.log")]
        values = [[json.loads(line)["data"] for line in lines] for lines in logs]
        found.append(({name.decode() for name in names}, values))
    return found


def trackio_entries(directory: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """(names of runs, what was logged, in order)."""
    (path,) = (directory / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    return {name for name, _ in rows}, [json.loads(metrics) for _, metrics in rows]


def test_tensorboard_shows_the_run(tracked):
    events = tensorboard_events(tracked)
    assert right_names(set(events.Tags()["scalars"]))
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx(losses(tracked), rel=1e-6)


@pytest.mark.parametrize("read", [wandb_entries, trackio_entries])
def test_wandb_and_trackio_wrote_the_run(tracked, read):
    runs, entries = read(tracked)
    assert runs == {tracker_run(tracked, read.__name__.removesuffix("_entries"))}
    assert right_names({name for entry in entries for name in entry})
    logged = {entry["train/global_step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}
    assert logged == pytest.approx(losses(tracked))


def test_swanlab_wrote_the_run(tracked):
    ((names, values),) = swanlab_runs(tracked)
    assert right_names(names)
    assert any(found == pytest.approx(list(losses(tracked).values())) for found in values)


@pytest.mark.slow
def test_a_resumed_run_hides_what_tensorboard_had_behind_its_checkpoint(resumed):
    events = tensorboard_events(resumed)
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in shown] == [1, 2, 3, 4]
    assert dict(shown) == pytest.approx(losses(resumed), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("read", [wandb_entries, trackio_entries])
def test_a_resumed_run_goes_on_in_the_same_run_of_its_tracker(resumed, read):
    runs, entries = read(resumed)
    assert runs == {tracker_run(resumed, read.__name__.removesuffix("_entries"))}
    logged = [(entry["train/global_step"], entry["train/loss"]) for entry in entries if "train/loss" in entry]
    assert [step for step, _ in logged] == [1, 2, 3, 3, 4]
    assert dict(logged) == pytest.approx(losses(resumed))


@pytest.mark.slow
def test_a_resumed_run_keeps_its_id_in_swanlab(resumed):
    (_, first), (_, second) = swanlab_runs(resumed)
    expected = list(losses(resumed).values())
    assert any(found == pytest.approx(expected[:3]) for found in first)
    assert any(found == pytest.approx(expected[2:]) for found in second)


def test_an_unknown_tracker_or_one_that_is_not_installed_is_refused(monkeypatch):
    with pytest.raises(SetupError, match="--report_to wandbb: unknown tracker") as caught:
        check_trackers(["wandbb"])
    assert "wandb" in str(caught.value.remedy)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="trackio is not installed") as caught:
        check_trackers(["trackio"])
    assert "dft-toolkit[trackio]" in str(caught.value.remedy)
    check_trackers(["none"])


@pytest.mark.parametrize("broken", ["add_scalar", "__init__"])
def test_a_tracker_that_fails_costs_its_numbers_and_not_the_run(
    broken, dataset, qwen3, train_here, tmp_path, monkeypatch
):
    """As tensorboard's does on a full disk. One that cannot be opened at all is told of before the first step."""
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, broken, full)
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path, "--max_steps", 3,
        "--logging_steps", 1, "--save_strategy", "no", "--report_to", "tensorboard",
    )  # fmt: skip
    if broken == "__init__":
        assert code == 2 and "--report_to tensorboard: no run could be opened: [Errno 28]" in error
        return
    assert code == 0 and handmade.read_state(tmp_path)["global_step"] == 3
    assert error.count("--report_to tensorboard: numbers are missing there from now on") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
