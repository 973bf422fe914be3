"""A step far above the last hundred is noted once, with the rows of the worst pack."""

from __future__ import annotations

import json
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dft_train.faults.spikes import MIN_STEPS, NAME, Spikes
from train import handmade


def told(losses, tokens=None):
    """Steps at which a spike was told, for losses by step; `tokens` of each step, by default 1000."""
    spikes = Spikes()
    tokens = tokens or [1000.0] * len(losses)
    found = [spikes.add(step, loss * live, live) for step, (loss, live) in enumerate(zip(losses, tokens, strict=True))]
    return [spike.step for spike in found if spike is not None]


def noisy(count, seed=0):
    source = random.Random(seed)
    return [2.0 + source.gauss(0, 0.1) for _ in range(count)]


def test_a_spike_is_told_where_it_begins():
    losses = [*noisy(50), 6.0, 6.5, 5.0, *noisy(20, seed=1), 7.0]
    assert told(losses) == [50, 73]


def test_noise_and_a_falling_loss_are_no_spikes():
    assert told(noisy(500)) == []
    assert told([10 / (1 + step / 20) + 0.01 * (step % 3) for step in range(300)]) == []
    assert told([1.0] * 200) == []


@given(st.lists(st.floats(0, 1e6), max_size=MIN_STEPS))
def test_under_so_many_steps_nothing_is_told(losses):
    assert told(losses) == []


@given(st.lists(st.floats(0.1, 10), min_size=MIN_STEPS, max_size=80), st.floats(0.001, 1000))
def test_what_is_told_does_not_depend_on_the_unit(losses, unit):
    # Powers of two, so that nothing is rounded.
    unit = 2.0 ** round(unit % 20 - 10)
    assert told([loss * unit for loss in losses]) == told(losses)


def test_few_tokens_make_a_mean_less_certain():
    losses = [*noisy(50), 3.5]
    assert told(losses) == [50]
    assert told(losses, [1000.0] * 50 + [30.0]) == []
    assert told(losses, [1000.0] * 50 + [0.0]) == []


def test_the_numbers_are_those_of_the_steps_before():
    spikes, losses = Spikes(), noisy(50)
    for step, loss in enumerate(losses):
        spikes.add(step, loss * 10, 10)
    spike = spikes.add(50, 90.0, 10)
    assert spike is not None and spike.ce_loss == 9.0
    assert spike.median == pytest.approx(statistics.median(losses))
    assert spike.deviations == pytest.approx(
        (9.0 - spike.median) / (1.4826 * statistics.median(abs(x - spike.median) for x in losses))
    )


def test_a_row_that_the_model_has_never_seen_is_named(tmp_path, train_here, tokenizer, qwen3):
    rows = [handmade.chat(tokenizer, [("user", "a" * 9), ("assistant", "bb")], "dull") for _ in range(60)]
    rows.append(handmade.chat(tokenizer, [("user", "?"), ("assistant", "QzXwVjKy")], "odd"))
    data = handmade.write_dataset(tmp_path / "data", rows, rows[:2], packing=False)
    run, flags = tmp_path / "run", ("--max_steps", 240, "--learning_rate", "1e-2", "--save_strategy", "no")
    code, error = train_here("--model_name_or_path", qwen3, "--dataset_dir", data, "--output_dir", run, *flags)
    assert code == 0
    lines = [json.loads(line) for line in (run / NAME).read_text().splitlines()]
    assert [row["row"] for line in lines for row in line["rows"]] == [60] * len(lines)
    assert 1 <= len(lines) <= 4 and lines[0]["rows"][0]["source"] == "odd"
    assert error.count("the cross entropy jumped") == len(lines) and "row 60 (odd, " in error
