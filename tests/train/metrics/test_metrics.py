"""What is logged: exact over ranks and layouts, the same after a resume, and kept as lines of JSON."""

from __future__ import annotations

import itertools
import json
import math
import resource
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState

from dft_train.data.sampler import Layout, StepSampler
from dft_train.loss import P_BINS, LossStats, linear_dft_loss
from dft_train.metrics.journal import JOURNAL_NAME, Journal, encode_line
from dft_train.metrics.sums import (
    BINS,
    FIELDS,
    MEASURED,
    SourceSums,
    Speed,
    StepSums,
    evaluation_names,
    peak_memory_gib,
    ratios,
)
from train import handmade

CPU = torch.device("cpu")


def stats_of(rows, seed, alpha=0.7):
    """(statistics of a real loss, and what they are made of: CE, p and entropy of each live row, in float64)."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 8, generator=random)
    weight = torch.randn(30, 8, generator=random)
    labels = torch.randint(0, 30, (rows,), generator=random)
    labels[::3] = -100
    _, stats = linear_dft_loss(hidden, weight, labels, dft_alpha=alpha, per_token=True)
    logs = torch.log_softmax(hidden.double() @ weight.double().T, dim=1)[labels >= 0]
    at_label = logs.gather(1, labels[labels >= 0, None]).squeeze(1)
    return stats, at_label, -(logs.exp() * logs).sum(dim=1)


def test_every_number_is_a_mean_over_the_live_tokens_of_all_ranks():
    parts = [stats_of(rows, seed) for seed, rows in enumerate((40, 7, 1, 23))]
    ranks = [StepSums(CPU), StepSums(CPU)]
    for number, (stats, _, _) in enumerate(parts):
        ranks[number % 2].add(stats)
    other = ranks[1].total(lambda sums: sums)
    both = ratios(ranks[0].total(lambda sums: sums + torch.tensor(other)))
    log_p, entropy = (torch.cat([part[at] for part in parts]) for at in (1, 2))
    p = log_p.exp()
    assert both["ce_loss"] == pytest.approx(-log_p.mean().item(), rel=1e-5)
    assert both["avg_p_correct"] == pytest.approx(p.mean().item(), rel=1e-5)
    assert both["effective_weight"] == pytest.approx((0.7 * p + 0.3).mean().item(), rel=1e-5)
    assert both["loss"] == pytest.approx(((0.7 * p + 0.3) * -log_p).mean().item(), rel=1e-5)
    assert both["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    shares = np.histogram(p.numpy(), bins=10, range=(0, 1))[0] / len(p)
    assert [both[name] for name in BINS] == pytest.approx(shares.tolist())
    assert len(BINS) == P_BINS and set(FIELDS.values()) <= set(LossStats._fields)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (0, 1)])
def test_a_checkpoints_sums_are_taken_up_with_and_without_an_auxiliary_loss(before, after):
    """As when a run of experts goes on with `--router_aux_loss_coef 0`, or no longer with it."""
    first = StepSums(CPU, before)
    kept = [float(number) for number in range(1, len(first.total(lambda sums: sums)) + 1)]
    sums = StepSums(CPU, after)
    sums.add_sums(kept)
    shared = len(FIELDS) + len(BINS)
    assert sums.total(lambda sums: sums) == [*kept[:shared], *[0.0] * after, kept[-1]]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=5))
def test_the_worst_of_the_ranks_comes_with_the_sums_in_one_collective(measured):
    sent: list[torch.Tensor] = []

    def send(mine: torch.Tensor) -> torch.Tensor:
        sent.append(mine)
        return mine

    for rank, values in enumerate(measured):
        sums = StepSums(CPU)
        sums.add_sums([float(rank + 1)] * 17)
        sums.total_and_worst(values, send, rank=rank, world_size=len(measured))
    assert len(sent) == len(measured)
    sums = StepSums(CPU)
    total, worst = sums.total_and_worst([0.0, 0.0], lambda _: sum(sent), rank=0, world_size=len(measured))
    assert total == [sum(range(1, len(measured) + 1))] * 17
    assert worst == [max(values[at] for values in measured) for at in (0, 1)]


def test_an_evaluation_counts_a_source_by_its_own_tokens():
    stats, log_p, _ = stats_of(30, 5)
    assert stats.tokens is not None
    sources = torch.arange(30) % 3
    sums = SourceSums(("a", "b", "c", "empty"), CPU)
    sums.add(stats, sources)
    overall, by_source = sums.metrics(lambda tensor: tensor)
    assert overall["avg_p_correct"] == pytest.approx(log_p.exp().mean().item(), rel=1e-5)
    # Every third label is dead: those are all of the first source.
    assert set(by_source) == {"b", "c"}
    live = torch.arange(30)[torch.arange(30) % 3 != 0]
    for at, name in ((1, "b"), (2, "c")):
        assert by_source[name]["ce_loss"] == pytest.approx(-log_p[live % 3 == at].mean().item(), rel=1e-5)


def test_speed_is_known_from_the_index_alone():
    tokens, flops = np.arange(1, 11), np.arange(1, 11) * 100.0
    layout = Layout(per_device=1, accumulation=2, world_size=2, rank=0)
    sampler = StepSampler(np.zeros(10), tokens, layout, tokens=tokens, costs=flops, index_seed=1, seed=2)
    speed = Speed(sampler, tokens, flops, peak=1000.0)
    order = [*sampler.order(0), *sampler.order(1)]
    # An epoch has 3 steps; its last has 2 packs.
    first = speed.metrics(2, seconds=2.0)
    seen = int(tokens[order[:8]].sum())
    assert first == {"tokens_seen": seen, "tokens_per_second": seen / 2, "mfu": pytest.approx(seen * 100 / 2 / 1000)}
    second = speed.metrics(4, seconds=1.0)
    assert second["tokens_seen"] == 55 + tokens[order[10:14]].sum()
    assert second["tokens_per_second"] == second["tokens_seen"] - seen
    resumed = Speed(sampler, tokens, flops, peak=None)
    resumed.start(2)
    assert resumed.metrics(4, seconds=1.0) == {name: value for name, value in second.items() if name != "mfu"}


def test_peak_memory_is_at_least_what_the_process_holds_now():
    assert (
        psutil.Process().memory_info().rss / 2**30 * 0.99 < peak_memory_gib(CPU) < psutil.virtual_memory().total / 2**30
    )


# metrics.jsonl


def journal(directory, history):
    """(the callback, its state) at the beginning of a run that goes on from `history`."""
    made = Journal(directory)
    state = TrainerState(log_history=list(history))
    made.on_train_begin(None, state, None)  # pyright: ignore[reportArgumentType]
    return made, state


def log(made, state, **entry):
    state.log_history.append(entry)
    made.on_log(None, state, None)


def lines(directory):
    return [json.loads(line) for line in (directory / JOURNAL_NAME).read_text().splitlines()]


def test_every_log_entry_is_a_line_in_its_order(tmp_path):
    made, state = journal(tmp_path / "run", [])
    log(made, state, loss=1.5, step=1, epoch=0.1)
    log(made, state, eval_loss=2.0, step=1, epoch=0.1)
    found = lines(tmp_path / "run")
    assert [{name: value for name, value in line.items() if name != "time"} for line in found] == state.log_history
    assert all(list(line)[:3] == ["step", "epoch", "time"] for line in found)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_strings_that_float_reads(value):
    line = encode_line({"loss": value, "step": 3}, 1.0)
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert float(read["loss"]) == value or (math.isnan(float(read["loss"])) and math.isnan(value))


def test_a_resumed_run_cuts_the_lines_behind_its_checkpoint(tmp_path):
    made, state = journal(tmp_path, [])
    for step in range(1, 6):
        log(made, state, loss=float(step), step=step)
    first_two = (tmp_path / JOURNAL_NAME).read_bytes().splitlines()[:2]
    made, state = journal(tmp_path, state.log_history[:2])
    log(made, state, loss=30.0, step=3)
    assert (tmp_path / JOURNAL_NAME).read_bytes().splitlines()[:2] == first_two
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("damage", [b"", b'{"step": 1, "loss": 1.0}\n{"step"', b"not json\n\xff\n"])
def test_a_line_that_a_killed_run_lost_comes_from_the_checkpoint(tmp_path, damage):
    (tmp_path / JOURNAL_NAME).write_bytes(damage)
    history = [{"loss": 1.0, "step": 1}, {"loss": 2.0, "step": 2}]
    made, state = journal(tmp_path, history)
    log(made, state, loss=3.0, step=3)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_fresh_start_keeps_an_older_file_aside(tmp_path):
    (tmp_path / JOURNAL_NAME).write_text('{"step": 9}\n')
    made, state = journal(tmp_path, [])
    log(made, state, loss=1.0, step=1)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert (tmp_path / f"{JOURNAL_NAME}.old").read_text() == '{"step": 9}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a device that is always full")
def test_a_full_disk_costs_lines_and_one_warning(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("dft_train.ranks.launch.warn", lambda message, *values: warned.append(message % values))
    made, state = journal(tmp_path, [])
    (tmp_path / JOURNAL_NAME).symlink_to("/dev/full")
    for step in (1, 2):
        log(made, state, loss=1.0, step=step)
    (tmp_path / JOURNAL_NAME).unlink()
    log(made, state, loss=1.0, step=3)
    assert len(warned) == 1 and "No space left on device" in warned[0]
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_half_a_line_is_taken_back(tmp_path):
    made, state = journal(tmp_path, [])
    log(made, state, loss=1.0, step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / JOURNAL_NAME).stat().st_size + 5, limits[1]))
    try:
        log(made, state, loss=1.0, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log(made, state, loss=1.0, step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


# The whole trainer


@pytest.fixture(scope="module")
def flags(dataset, qwen3):
    return (
        "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--max_steps", 4, "--logging_steps", 2,
        "--eval_strategy", "steps", "--eval_steps", 4, "--save_strategy", "no", "--learning_rate", 1e-2,
    )  # fmt: skip


def steady(entry):
    """An entry without what is measured in seconds or bytes."""
    times = (*MEASURED, "eval_runtime", "eval_tokens_per_second", "train_runtime", "time")
    return {name: value for name, value in entry.items() if name not in times and "per_second" not in name}


@pytest.mark.slow
def test_two_ranks_log_what_one_logs_and_metrics_jsonl_has_it_all(tmp_path, flags, ranks):
    ranks(1, *flags, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps", 4, "--peak_tflops", 0.001)
    ranks(2, *flags, "--output_dir", tmp_path / "two", "--gradient_accumulation_steps", 2)
    one, two = (handmade.read_state(tmp_path / name)["log_history"] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for entry, other in zip(one, two, strict=True):
        assert steady(entry) == pytest.approx(steady(other), rel=2e-4, abs=1e-6)
    assert one[0]["mfu"] > 0 and "mfu" not in two[0]
    assert all(0 <= entry["data_wait"] <= 1 and entry["peak_memory_gib"] > 0.05 for entry in (*one[:2], *two[:2]))
    assert one[-1]["total_flos"] == two[-1]["total_flos"] > 0
    for name, history in (("one", one), ("two", two)):
        assert [
            {key: value for key, value in line.items() if key != "time"} for line in lines(tmp_path / name)
        ] == history


def test_no_source_takes_the_name_of_another_number():
    """`eval_ce_loss` is the cross entropy, and the loss of a source called `ce`; `eval_x_ce_loss` could be two."""
    number = itertools.count()
    names = ("loss", "ce_loss")
    overall = {name: float(next(number)) for name in names}
    by_source = {source: {name: float(next(number)) for name in names} for source in ("ce", "x", "x_ce", "chat")}
    metrics, tracked = evaluation_names("eval", overall, by_source)
    assert sorted(metrics.values()) == list(range(10))
    assert metrics["eval_loss"] == 0 and metrics["eval_ce_loss"] == 1
    assert {metrics["eval_ce/loss"], metrics["eval_ce_ce_loss"]} == {2, 3}
    assert {metrics["eval_x_ce_loss"], metrics["eval_x_ce/loss"]} == {5, 6}
    assert metrics["eval_chat_loss"] == 8
    shown = {tracked.get(name, name) for name in metrics}
    assert shown == {f"eval_{s}/{name}" for s in by_source for name in names} | {"eval_loss", "eval_ce_loss"}
