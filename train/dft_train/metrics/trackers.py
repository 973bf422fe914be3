"""Where metrics go: which trackers there are, whether they can be used, and opening those that need it.

`check_trackers` is called before anything slow (`training_arguments`), `open_trackers` by `trainer` on rank 0
before the loop starts, so that a missing login is a message and not a traceback in the middle of it, and a resumed
run goes on in the tracker's run that it had. What fails later costs numbers, and never the run. Names are
`train/loss`, `eval/loss`, `eval/<source>/loss` in all of them (transformers' own callbacks make them).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dft_common.errors import SetupError
from dft_common.flags import nearest
from dft_train.ranks import launch

TRACKERS = ("wandb", "swanlab", "tensorboard", "trackio")
"""Each is an extra of this distribution too."""


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
            remedy = f"run `pip install 'dft-toolkit[{name}]'`"
            raise SetupError(f"--report_to {name}: {name} is not installed", remedy=remedy)


class Opening(NamedTuple):
    """What a tracker is opened with."""

    run_name: str | None
    output_dir: Path
    known: str | None
    """What `open_trackers` returned for it before the run was interrupted; None for a new run."""
    step: int
    """Steps that the run has done."""


def _open_swanlab(opening: Opening, args: Any, callbacks: Sequence[Any]) -> str:
    """transformers' callback asks for the open run, which newer versions of swanlab answer with an error where there
    is none: so the run is opened here."""
    import swanlab

    run_id = os.environ.get("SWANLAB_RUN_ID", opening.known)
    resume: Any = os.environ.get("SWANLAB_RESUME", "allow" if run_id else None)
    project = os.environ.get("SWANLAB_PROJECT")
    try:
        return swanlab.init(project=project, name=opening.run_name, id=run_id, resume=resume).id
    except Exception as error:
        raise SetupError(
            f"--report_to swanlab: no run could be opened: {error}",
            remedy="run `swanlab login`, or set SWANLAB_MODE=local (or offline) in the environment",
        ) from None


def _open_wandb(opening: Opening, args: Any, callbacks: Sequence[Any]) -> str:
    """transformers' callback takes the run that is open."""
    import wandb

    online = os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun", "shared")
    run_id = os.environ.get("WANDB_RUN_ID", opening.known)
    resume: Any = os.environ.get("WANDB_RESUME", "allow" if run_id and online else None)
    remedy = "run `wandb login`, or set WANDB_MODE=offline in the environment"
    try:
        if online and not wandb.login():
            raise SetupError("--report_to wandb: not logged in", remedy=remedy)
        project = os.environ.get("WANDB_PROJECT", "huggingface")
        return wandb.init(project=project, name=opening.run_name, id=run_id, resume=resume).id
    except wandb.Error as error:
        raise SetupError(f"--report_to wandb: {error}", remedy=remedy) from None


def _open_tensorboard(opening: Opening, args: Any, callbacks: Sequence[Any]) -> str:
    """Events after `step`, of a run that was interrupted, are no longer shown."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

    asked = os.environ.get("TENSORBOARD_LOGGING_DIR")
    directory = asked or opening.known or str(opening.output_dir / default_logdir())
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            purge_step = opening.step + 1 if opening.known else None
            callback.tb_writer = SummaryWriter(log_dir=directory, purge_step=purge_step)
    return directory


def _open_trackio(opening: Opening, args: Any, callbacks: Sequence[Any]) -> str:
    """transformers' callback opens it, and goes on in a run of the same name: so it has one."""
    own = f"{opening.output_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.run_name = opening.known or opening.run_name or own
    return args.run_name


_OPEN = {
    "swanlab": _open_swanlab,
    "wandb": _open_wandb,
    "tensorboard": _open_tensorboard,
    "trackio": _open_trackio,
}


class _Careful:
    """Calls a tracker's events: what fails in one costs its numbers, with one warning, and not the run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._warned = False

    def around(self, event: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(event)
        def careful(*args: Any, **kwargs: Any) -> Any:
            try:
                return event(*args, **kwargs)
            except Exception as error:
                if not self._warned:
                    launch.warn(
                        "--report_to %s: numbers are missing there from now on (metrics.jsonl has all): %s: %s",
                        self._name,
                        type(error).__name__,
                        str(error).strip().partition("\n")[0],
                    )
                self._warned = True

        return careful


def guard_trackers(callbacks: Sequence[Any], names: Sequence[str]) -> None:
    """Let no failure of a tracker (a full disk, a lost network) end the run that it watches."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    for name in names:
        kinds = tuple(get_reporting_integration_callbacks([name]))
        for callback in callbacks:
            if isinstance(callback, kinds):
                careful = _Careful(name)
                for event in [event for event in dir(callback) if event.startswith("on_")]:
                    setattr(callback, event, careful.around(getattr(callback, event)))


def open_trackers(trainer: Any, known: Mapping[str, str], step: int) -> dict[str, str]:
    """Open the runs of `args.report_to` before the training loop; on rank 0 alone.

    Returns what finds each again, to be kept in checkpoints: the ids of wandb's and swanlab's runs, tensorboard's
    directory, trackio's name. `known` is that of the run to go on with, which has done `step` steps. Raises SetupError.
    """
    args = trainer.args
    runs = {}
    for name in args.report_to:
        opening = Opening(args.run_name, Path(args.output_dir), known.get(name), step)
        try:
            runs[name] = _OPEN[name](opening, args, trainer.callback_handler.callbacks)
        except OSError as error:
            raise SetupError(
                f"--report_to {name}: no run could be opened: {error}",
                remedy="mend that, or leave --report_to out: metrics.jsonl in --output_dir has every number",
            ) from None
    guard_trackers(trainer.callback_handler.callbacks, args.report_to)
    return runs
