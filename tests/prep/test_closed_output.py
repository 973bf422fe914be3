"""Outputs that take nothing: a full disk and a closed stdout end a command as CLI.md has it, without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tiny

FULL = Path("/dev/full")


@pytest.fixture
def bad_file(tmp_path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": 1}\n')
    return path


def dft_prep(*words: object, **streams) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dft_prep", *map(str, words)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **streams)


@pytest.mark.skipif(not FULL.exists(), reason="Linux alone has a device that is always full")
@pytest.mark.parametrize("format", ["text", "json", "sarif"])
def test_a_full_disk_behind_stdout_exits_2(bad_file, format):
    with FULL.open("w") as full:
        done = dft_prep("validate", "--format", format, "--data_files", bad_file, stdout=full)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_closed_stdout_leaves_the_exit_code(bad_file, tmp_path):
    good = tmp_path / "good.jsonl"
    tiny.write_jsonl(good, tiny.numbered(2))
    for file, expected in ((bad_file, 1), (good, 0)):
        shell = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "dft_prep", "validate", "--data_files", file]
        done = subprocess.run(shell, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr
        assert "Traceback" not in done.stderr
