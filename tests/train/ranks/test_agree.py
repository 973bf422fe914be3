"""What the ranks agree on is the same on all of them, and asking does not wait."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time

import torch
import torch.distributed as dist

from dft_train.checkpoints import checkpointed
from dft_train.ranks.agree import Agreement


def run_ranks(count, folder, work):
    """`work(rank, folder, agreement)` in forked processes with a gloo group; what each returned."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def rank_main(rank):
        store = dist.FileStore(str(folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        results.put((rank, work(rank, folder, Agreement())))
        dist.destroy_process_group()

    ranks = [context.Process(target=rank_main, args=(rank,), daemon=True) for rank in range(count)]
    for rank in ranks:
        rank.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    return [found[rank] for rank in range(count)]


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def test_the_sums_are_those_of_all_ranks_in_the_order_of_questions(tmp_path):
    def work(rank, folder, agreement):
        answers = []
        for step in range(20):
            agreement.ask(rank + 1, step * 0.5)
            answers.append(agreement.answer())
        return answers, agreement.gather(("rank", rank))

    first, second = run_ranks(2, tmp_path, work)
    assert first == second
    assert first == ([[3.0, step * 1.0] for step in range(20)], [("rank", 0), ("rank", 1)])


def test_asking_waits_for_no_other_rank(tmp_path):
    def work(rank, folder, agreement):
        if rank == 1:
            # Only asks once rank 0 has come back from asking: were asking to wait, this would never end.
            wait_for(folder / "asked")
        agreement.ask(1.0)
        (folder / "asked").touch()
        return agreement.answer()

    assert run_ranks(2, tmp_path, work) == [[2.0], [2.0]]


def test_a_question_that_is_never_answered_keeps_no_rank_from_ending(tmp_path):
    def work(rank, folder, agreement):
        agreement.ask(float(rank))
        return agreement.is_open

    assert run_ranks(2, tmp_path, work) == [True, True]


def test_a_single_rank_answers_itself():
    assert "RANK" not in os.environ
    agreement = Agreement()
    agreement.ask(1.5, 2.0)
    assert agreement.is_open and agreement.answer() == [1.5, 2.0] and not agreement.is_open
    assert agreement.sum_now(4.0) == [4.0]
    assert agreement.gather("a") == ["a"]


def test_ranks_wait_for_each_other_as_long_as_ddp_timeout_says(dataset, qwen3, train_here, monkeypatch, tmp_path):
    """Others wait here while rank 0 writes a checkpoint, to a slow disk for longer than torch's half hour."""

    def work(rank, folder, agreement):
        group = Agreement(datetime.timedelta(seconds=77))._group
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    assert run_ranks(2, tmp_path, work) == [77, 77]
    given = []
    monkeypatch.setattr(checkpointed, "Agreement", lambda timeout: given.append(timeout) or Agreement(timeout))
    common = ("--dataset_dir", dataset, "--model_name_or_path", qwen3, "--output_dir", tmp_path / "run")
    assert train_here(*common, "--eval_only", "--ddp_timeout", 77)[0] == 0
    assert given == [datetime.timedelta(seconds=77)]
