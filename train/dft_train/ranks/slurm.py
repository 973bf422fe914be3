"""`srun dft-train ...`: each task of the step is a rank; no other launcher is needed. Called by `cli` before all else.

Slurm tells a task its number and the step's nodes; this is put into the variables that torch reads. Only inside a
step of several tasks: a batch script, an interactive shell, and `srun torchrun ...` (whose ranks have theirs) are
left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from dft_common.errors import SetupError
from dft_train.ranks.launch import LAUNCH_ID

_FIRST_PORT, _PORTS = 15000, 15000
"""Below the ports that Linux gives to outgoing connections (32768 and up)."""


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes it: `r[1-2]n[01-16],x7` -> `r1n01`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def tasks_per_node(text: str) -> list[int]:
    """`8(x2),4` -> [8, 8, 4]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def in_step(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several tasks of an srun step."""
    return "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What torch reads, for a task of a step; a MASTER_ADDR or MASTER_PORT that is set wins. Raises SetupError."""
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    host = environ.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise SetupError(
            "Slurm does not say on which nodes this step runs (SLURM_STEP_NODELIST is not set)",
            remedy="set MASTER_ADDR to the host of task 0",
        )
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ["SLURM_STEP_NUM_TASKS"]
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(per_node)[int(environ.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": host,
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_FIRST_PORT + (job * 7 + step) % _PORTS),
        # A job that is put back into the queue keeps its number.
        LAUNCH_ID: f"slurm-{job}.{step}.{environ.get('SLURM_RESTART_COUNT', '0')}",
    }


def adopt() -> None:
    """Make this process a rank where srun alone has started it."""
    if in_step() and "RANK" not in os.environ:
        os.environ.update(rank_environment(os.environ))
