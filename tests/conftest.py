"""What holds for all tests: how hypothesis tries, and what is made once for all workers."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The verdict on a change may depend on the change alone: the same cases each time, and no clock. New cases are for
# the nightly run.
settings.register_profile("every-change", deadline=None, derandomize=True)
settings.register_profile("nightly", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("DFT_HYPOTHESIS", "every-change"))


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """`once(name, make)`: what `make(directory)` returned (as JSON has it), made by the first worker that asks; the
    tests of one module may be dealt to several."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made_once(name: str, make: Callable[[Path], Any]) -> Any:
        directory, result = root / name, root / f"{name}.json"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                directory.mkdir(exist_ok=True)
                result.write_text(json.dumps(make(directory)))
        return json.loads(result.read_text())

    return made_once
