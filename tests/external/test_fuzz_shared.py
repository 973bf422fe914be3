"""The damage of tests/prep/test_fuzz.py, done to the beginnings of real files by other people."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from prep.test_fuzz import CASES, damaged, try_file

SOURCES = Path(__file__).resolve().parents[3] / "shared" / "sources"
FILES = sorted(SOURCES.glob("*.json*")) if SOURCES.is_dir() else []
pytestmark = pytest.mark.skipif(not FILES, reason="the shared data is not here")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_damage_to_a_real_file_crashes_or_loses_a_record(tmp_path, path):
    chance = random.Random(path.name)
    beginning = path.read_bytes()[:30_000]
    for number in range(CASES // 20):
        try_file(tmp_path / f"{number}{path.suffix}", damaged(beginning, chance))
