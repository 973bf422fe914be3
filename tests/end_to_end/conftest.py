from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A directory with a tokenizer and its chat template."""
    return tiny.write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def dft_prep(tmp_path):
    """Run `dft-prep` as its user would, in a process of its own, in tmp_path."""

    def run(
        *arguments: object, check: int | None = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "dft_prep", *(str(argument) for argument in arguments)]
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ, **(env or {})}
        )
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run
