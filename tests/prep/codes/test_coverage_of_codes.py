"""Every code of a finding is named by some test that makes it appear; the rules by their examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dft_prep.codes.table import CODES

TESTS = Path(__file__).resolve().parents[2]
NOT_TESTS = {"test_coverage_of_codes.py", "test_codes.py", "test_findings.py"}


@pytest.fixture(scope="module")
def named() -> set[str]:
    found: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        if path.name not in NOT_TESTS:
            found |= set(re.findall(r"\"([a-z0-9_]+)\"", path.read_text("utf-8")))
    return found


def test_every_code_is_named_by_a_test(named):
    assert [name for name, code in CODES.items() if name not in named and code.scope != "rule"] == []
