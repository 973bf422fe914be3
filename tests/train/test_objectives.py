"""The table of objectives: its formulas, its flags, and that every one trains the same in every layout.

That loss and gradient are right for each is shown in `test_loss`.
"""

from __future__ import annotations

import math

import pytest
import torch

from dft_common.errors import SetupError
from dft_train.objectives import OBJECTIVES, OPTIONS, RowFacts, with_defaults
from dft_train.settings.arguments import OWN_FLAGS
from dft_train.train_command import choose_command
from train.same_run import assert_same_run
from train.settings.test_arguments import COMMON, parse

FLAGS = {flag.name: flag for flag in OWN_FLAGS}


def weigh(objective, logits, label=0, **given):
    logits = torch.tensor([logits])
    log_p = logits.log_softmax(-1)
    facts = RowFacts(log_p[:, label].exp(), -log_p[:, label], -(log_p.exp() * log_p).sum(-1), logits)
    return OBJECTIVES[objective].weight(facts, with_defaults(objective, given)).item()


def test_what_the_weights_are_at_known_places():
    half = [0.0, 0.0]
    assert weigh("dft", half, dft_alpha=0.7) == pytest.approx(0.65)
    assert weigh("sft", half) == 1
    assert weigh("power", half, power_k=2.0) == pytest.approx(0.25)
    assert weigh("power", half, power_k=0.0) == 1
    assert [weigh("threshold", half, threshold_low=low, threshold_high=high) for low, high in ((0.5, 1), (0, 0.5))] == [
        1,
        1,
    ]
    assert [weigh("threshold", half, threshold_low=low, threshold_high=high) for low, high in ((0.6, 1), (0, 0.4))] == [
        0,
        0,
    ]
    assert weigh("eaft", half, eaft_top_k=20) == pytest.approx(1)
    assert weigh("eaft", [0.0] * 50, eaft_top_k=20) == pytest.approx(1)
    assert weigh("eaft", [90.0] + [0.0] * 50) == pytest.approx(0, abs=1e-6)
    # Two that are alike and far above the rest: log 2 / log 20.
    assert weigh("eaft", [90.0, 90.0] + [0.0] * 50) == pytest.approx(math.log(2) / math.log(20))
    assert weigh("eaft", [90.0, 90.0] + [0.0] * 50, eaft_alpha=2.0) == pytest.approx((math.log(2) / math.log(20)) ** 2)


def test_dft_and_power_meet_at_their_ends():
    logits = [0.3, -1.0, 2.0]
    assert weigh("power", logits, power_k=1.0) == pytest.approx(weigh("dft", logits, dft_alpha=1.0))
    assert weigh("power", logits, power_k=0.0) == weigh("sft", logits) == weigh("dft", logits, dft_alpha=0.0)


def test_every_option_is_a_flag_with_the_tables_default():
    assert set(FLAGS["objective"].choices) == set(OBJECTIVES)
    for option, objective in OPTIONS.items():
        assert float(FLAGS[option].default) == OBJECTIVES[objective].options[option]
    for name, objective in OBJECTIVES.items():
        assert objective.source and objective.formula in FLAGS["objective"].help, name
        assert all(option in objective.formula for option in objective.options), name


def test_options_come_with_their_objective(monkeypatch):
    settings = parse(monkeypatch, *COMMON, "--objective", "threshold", "--threshold_low", "0.2")
    assert settings.objective_options == {"threshold_low": 0.2, "threshold_high": 1.0}
    settings = parse(monkeypatch, *COMMON)
    assert (settings.objective, str(settings.dft_alpha), settings.objective_options) == ("dft", "0.7", {})
    assert settings.fused_loss == "auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("--objective", "sft", "--dft_alpha", "0.5"), "--dft_alpha belongs to --objective dft", id="dft"),
        pytest.param(("--power_k", "2"), "--power_k belongs to --objective power, found --objective dft", id="power"),
        pytest.param(("--objective", "power", "--eaft_top_k", "5"), "--eaft_top_k belongs to", id="eaft"),
        pytest.param(
            ("--objective", "threshold", "--threshold_low", "0.9", "--threshold_high", "0.1"), "is above", id="swapped"
        ),
    ],
)
def test_options_of_another_objective_are_refused(arguments, message):
    words = [*COMMON, *arguments]
    with pytest.raises(SetupError, match=message):
        choose_command(words).main(words, standalone_mode=False)


RUNS = [pytest.param(name, marks=() if name == "eaft" else pytest.mark.slow, id=name) for name in sorted(OBJECTIVES)]


@pytest.mark.parametrize("objective", RUNS)
def test_fused_on_two_zero3_ranks_trains_what_the_reference_does_on_one(
    objective, dataset, qwen3, zero3_float32, ranks, train_here, tmp_path
):
    """Packs of several slices, weighted rows, a short last step; one way without a word of the other's code."""
    flags = (
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--objective", objective, "--max_steps", 7,
        "--logging_steps", 1, "--learning_rate", 3e-3, "--adam_epsilon", 1e-4, "--save_strategy", "no",
        "--eval_strategy", "steps", "--eval_steps", 7,
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    whole = ("--per_device_train_batch_size", 4)
    assert train_here(*flags, "--output_dir", one, "--fused_loss", "off", *whole)[0] == 0
    parts = ("--gradient_accumulation_steps", 2, "--deepspeed", zero3_float32, "--torch_dtype", "float32")
    ranks(2, *flags, "--output_dir", two, "--fused_loss", "on", *parts)
    assert_same_run(two, one, rel=1e-4, weights=2e-4)
