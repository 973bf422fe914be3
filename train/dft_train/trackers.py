"""Where metrics go: which trackers there are, whether they can be used, and opening those that need it.

`check_trackers` is called before anything slow (`training_arguments`), `open_trackers` by `trainer` on rank 0
before the loop starts, so that a missing login is a message and not a traceback in the middle of it. Names are
`train/loss`, `eval/loss`, `eval/<source>/loss` in all of them (transformers' own callbacks make them).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from dft_common.errors import SetupError
from dft_common.flags import nearest

TRACKERS = ("wandb", "swanlab", "tensorboard", "trackio")
_EXTRAS = ("wandb", "swanlab", "tensorboard")
"""Those that are extras of this distribution under their own name."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise SetupError for a tracker that is unknown or not installed."""
    for name in names:
        if name == "none":
            continue
        if name not in TRACKERS:
            raise SetupError(
                f"--report_to {name}: unknown tracker{nearest(name, TRACKERS).replace('--', '')}",
                remedy=f"known are {', '.join(TRACKERS)} and none",
            )
        if importlib.util.find_spec(name) is None:
            package = f"'dft-toolkit[{name}]'" if name in _EXTRAS else name
            raise SetupError(f"--report_to {name}: {name} is not installed", remedy=f"run `pip install {package}`")


def _open_swanlab(run_name: str | None, resumes: bool) -> None:
    """transformers' callback asks for the open run, which newer versions of swanlab answer with an error where there
    is none: so the run is opened here, with what that callback would have given."""
    import swanlab

    run_id = os.environ.get("SWANLAB_RUN_ID")
    resume: Any = os.environ.get("SWANLAB_RESUME", "allow" if resumes else None)
    try:
        swanlab.init(project=os.environ.get("SWANLAB_PROJECT"), name=run_name, id=run_id, resume=resume)
    except Exception as error:
        raise SetupError(
            f"--report_to swanlab: no run could be opened: {error}",
            remedy="run `swanlab login`, or set SWANLAB_MODE=local (or offline) in the environment",
        ) from None


def _open_wandb() -> None:
    import wandb

    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun", "shared"):
        return
    try:
        logged_in = wandb.login()
    except wandb.Error as error:
        raise SetupError(
            f"--report_to wandb: {error}", remedy="run `wandb login`, or set WANDB_MODE=offline in the environment"
        ) from None
    if not logged_in:
        raise SetupError(
            "--report_to wandb: not logged in",
            remedy="run `wandb login`, or set WANDB_MODE=offline in the environment",
        )


def open_trackers(names: Sequence[str], *, run_name: str | None, resumes: bool) -> None:
    """Open what must be open before the training loop. Called on rank 0 alone. Raises SetupError."""
    if "swanlab" in names:
        _open_swanlab(run_name, resumes)
    if "wandb" in names:
        _open_wandb()
