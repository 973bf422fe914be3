"""Trackers for real: files that wandb (offline), swanlab (local) and tensorboard wrote, read back."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, dataset, qwen3, launch) -> Path:
    directory = tmp_path_factory.mktemp("tracked")
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(directory / "wandb"),
        "WANDB_SILENT": "true",
        "SWANLAB_MODE": "local",
        "SWANLAB_LOG_DIR": str(directory / "swanlab"),
    }
    (directory / "wandb").mkdir()
    launch(
        "python", 1, "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", directory / "run",
        "--max_steps", 2, "--logging_steps", 1, "--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "no",
        "--report_to", "wandb", "swanlab", "tensorboard", "--logging_dir", directory / "tensorboard",
        env=environment,
    )  # fmt: skip
    return directory


NAMES = (
    "train/loss", "train/ce_loss", "train/avg_p_correct", "train/token_accuracy", "train/dft_alpha", "train/grad_norm",
    "train/learning_rate", "train/tokens_seen", "train/tokens_per_second", "eval/loss", "eval/ce_loss",
    "eval/avg_p_correct", "eval/sums/loss", "eval/more/avg_p_correct",
)  # fmt: skip


def content(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def test_tensorboard_in_logging_dir(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert set(NAMES) <= set(tags)
    assert not [tag for tag in tags if tag.startswith(("train/train/", "eval/eval"))]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_offline_trackers_wrote_the_run(tracked, tracker):
    found = content(tracked / tracker)
    for name in NAMES:
        assert name.encode() in found, name
    assert b"train/train/" not in found
