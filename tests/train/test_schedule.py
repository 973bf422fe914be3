"""dft_alpha over the run: a function of the step and the number of steps alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dft_common.errors import SetupError
from dft_train.schedule import AlphaSchedule, parse_alpha
from train import handmade

values = st.floats(0, 1).map(lambda value: round(value, 4))
schedules = st.builds(
    AlphaSchedule,
    start=values,
    end=values,
    shape=st.sampled_from(["linear", "cosine"]),
    reached=st.floats(0.01, 1).map(lambda value: round(value, 4)),
)


@given(schedules, st.integers(2, 500))
def test_it_goes_from_start_to_end_without_a_step_back(schedule, steps):
    found = [schedule.at(step, steps) for step in range(steps + 2)]
    assert found[0] == pytest.approx(schedule.start, abs=1e-9) or schedule.reached * (steps - 1) <= 0
    assert found[steps - 1 :] == [schedule.end] * 3
    assert found == sorted(found, reverse=schedule.end < schedule.start)
    assert all(0 <= value <= 1 for value in found)


@given(schedules)
def test_what_it_prints_as_it_is_parsed_from(schedule):
    read = parse_alpha(str(schedule))
    assert [read.at(step, 40) for step in range(41)] == [schedule.at(step, 40) for step in range(41)]


def test_the_spellings():
    assert parse_alpha("0.7") == AlphaSchedule(start=0.7, end=0.7)
    assert parse_alpha("0.0:0.7").at(5, 11) == pytest.approx(0.35)
    assert parse_alpha("linear:1:0").at(1, 5) == 0.75
    assert parse_alpha("cosine:0:0.8").at(1, 5) == pytest.approx(0.4 * (1 - 0.5**0.5))
    tenth = parse_alpha("0:0.7@0.1")
    assert tenth.at(5, 101) == pytest.approx(0.35) and tenth.at(10, 101) == tenth.at(80, 101) == 0.7
    # No steps: an evaluation alone.
    assert parse_alpha("0:0.7").at(0, 0) == 0.7


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "-0.1", "nan", "0:", "0:1:2", "0.7@0.5", "cosine:0.7", "0:1@0", "0:1@2", "step:0:1"]
)
def test_other_spellings_are_refused_with_the_right_ones(text):
    with pytest.raises(SetupError) as caught:
        parse_alpha(text)
    assert str(caught.value).startswith(f"--dft_alpha {text}:") and "cosine:0:0.7" in caught.value.remedy


def test_training_and_evaluation_take_the_alpha_of_their_step(dataset, qwen3, train_here, tmp_path):
    """With a learning rate of 0 the loss depends on alpha alone, linearly; its ends are known from evaluations."""
    common = ("--dataset_dir", dataset, "--model_name_or_path", qwen3)
    ends = []
    for alpha in ("0", "0.5:1"):
        assert train_here(*common, "--output_dir", tmp_path / alpha, "--eval_only", "--dft_alpha", alpha)[0] == 0
        ends.append(json.loads((tmp_path / alpha / "eval_results.json").read_text())["eval_loss"])
    code, _ = train_here(
        *common, "--output_dir", tmp_path / "run", "--dft_alpha", "0:1", "--max_steps", 5, "--logging_steps", 2,
        "--learning_rate", 0, "--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "no",
    )  # fmt: skip
    assert code == 0
    lines = handmade.read_state(tmp_path / "run")["log_history"]
    # Steps 1 to 5 have 0, 0.25, 0.5, 0.75, 1: a log line has that of its last step, an evaluation the next one's.
    assert [line["dft_alpha"] for line in lines if "dft_alpha" in line] == [0.25, 0.75]
    found = [line["eval_loss"] for line in lines if "eval_loss" in line]
    expected = [ends[0] + alpha * (ends[1] - ends[0]) for alpha in (0.5, 1.0, 1.0)]
    assert found == pytest.approx(expected[: len(found)], rel=1e-5) and len(found) >= 2
