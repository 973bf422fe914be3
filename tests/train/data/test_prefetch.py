"""Reading ahead changes when a batch is read, and nothing else."""

from __future__ import annotations

import gc
import itertools
import shutil
import threading
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_common.manifest import read_manifest, write_manifest
from dft_train.data.prefetch import THREAD_NAME, StepReader, read_ahead


def readers():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Counted:
    """Yields 0, 1, 2, ... and knows how far it was read."""

    def __init__(self, end):
        self.end, self.read = end, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.read == self.end:
            raise StopIteration
        self.read += 1
        return self.read - 1


@settings(max_examples=30)
@given(items=st.integers(0, 12), count=st.integers(1, 5), epochs=st.integers(1, 3))
def test_steps_get_the_same_items_in_the_same_order(items, count, epochs):
    reader = StepReader()
    for _ in range(epochs):
        source, plain = iter(range(items)), iter(range(items))
        for _ in range(-(-items // count) + 1):
            assert reader.take(source, count) == list(itertools.islice(plain, count))
    reader.close()
    assert not readers()


def test_reads_one_step_ahead_and_no_further():
    source, reader = Counted(100), StepReader()
    assert reader.take(source, 3) == [0, 1, 2]
    until(lambda: source.read == 6)
    time.sleep(0.05)
    assert source.read == 6
    reader.close()
    assert not readers() and source.read == 6


def test_an_error_arrives_where_its_item_would_have_come():
    def broken():
        yield "first"
        raise ValueError("row 7 is damaged")

    ahead = read_ahead(broken(), room=4)
    assert next(ahead) == "first"
    with pytest.raises(ValueError, match="row 7 is damaged"):
        next(ahead)
    assert not readers()
    assert list(ahead) == []


def test_no_thread_outlives_a_reader_that_is_dropped_or_left():
    for item in read_ahead(Counted(100), room=2):
        if item == 1:
            break
    gc.collect()
    until(lambda: not readers())

    def fails():
        for _ in read_ahead(Counted(100), room=2):
            raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError):
        fails()
    gc.collect()
    until(lambda: not readers())


def test_processes_that_read_ahead_need_no_thread():
    class Loader(Counted):
        _num_workers = 2

    source = Loader(3)
    ahead = read_ahead(source, room=2)
    assert next(ahead) == 0 and source.read == 1 and not readers()
    assert list(ahead) == [1, 2]


def test_a_damaged_row_ends_the_run_with_its_message_and_no_thread_is_left(tmp_path, dataset, qwen3, train_here):
    damaged = tmp_path / "data"
    shutil.copytree(dataset, damaged)
    manifest = read_manifest(damaged)
    write_manifest(damaged, msgspec.structs.replace(manifest, sources=manifest.sources[:1]))
    flags = ("--dataset_dir", damaged, "--model_name_or_path", qwen3, "--output_dir", tmp_path / "run")
    code, error = train_here(*flags, "--max_steps", 2, "--save_strategy", "no")
    assert code == 1 and "which the manifest does not list" in error and "dft-prep verify" in error
    assert not readers()
