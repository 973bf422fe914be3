"""The process's surroundings: launcher environment, DeepSpeed on a CPU, and what other libraries may print.

Called by `trainer` before and after TrainingArguments exist. Without an accelerator the ranks talk through gloo.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dft_common import logs
from dft_common.errors import SetupError, report_error

NOISY = ("DeepSpeed", "deepspeed", "accelerate", "datasets", "torch.distributed", "torch.utils.cpp_extension")
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where a rank leaves its error for torchrun, which shows it as the root cause, and for `ranks`."""
LAUNCH_ID = "DFT_LAUNCH_ID"
"""What all ranks of this launch share and no other launch has; `ranks` and `slurm` set it."""
EXIT_TERMINATED = 143
MEET_SECONDS = 300.0
"""From the first rank at the meeting to the last: what imports on a slow disk may take, and no hour."""
ALONE_SECONDS = 3.0
_DRIVER = Path("/dev/nvidiactl")
"""There while NVIDIA's driver is loaded."""
_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DEEPSPEED_LOG_LEVEL": "warning",
    "DS_SKIP_CUDA_CHECK": "1",
}


def warn(message: str, *values: Any) -> None:
    """Warn of what every rank finds alike: rank 0 says it, once."""
    if logs.rank_and_world_size()[0] == 0:
        logs.get_logger().warning(message, *values)


def quieten() -> None:
    """Let other libraries speak only when something is wrong; what the user set wins. Before torch is imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Deprecations inside of libraries are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r".*OMP_NUM_THREADS/MKL_NUM_THREADS unset.*")
    warnings.filterwarnings("ignore", message=r".*barrier\(\): using the device.*")


def quieten_transformers() -> None:
    """The same for transformers, which imports DeepSpeed where it is installed: so its device is named before."""
    if not has_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def has_accelerator() -> bool:
    """Whether torch sees a device other than the CPU that training could run on."""
    import torch

    return torch.accelerator.is_available()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def local_world_size() -> int:
    """Ranks on this node; the DeepSpeed launcher has a name of its own for it."""
    found = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE")
    return int(found or 1)


def _warn_of_unseen_gpu() -> None:
    """A run on the CPU of a machine with GPUs is a mistake of the installation, and shows by its slowness alone."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if _DRIVER.exists() and not hidden:
        warn(
            "this machine has an NVIDIA GPU, which torch %s does not see: it computes on the CPU, and that is slow. "
            "`python -c 'import torch; torch.zeros(1).cuda()'` tells why (a torch without CUDA, or too old a driver)",
            torch.__version__,
        )


def check_devices() -> None:
    """Raises SetupError where this node has more ranks than accelerators. Without any, ranks share the CPU."""
    import torch

    devices = torch.accelerator.device_count() if has_accelerator() else 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not devices:
        _warn_of_unseen_gpu()
    if not devices or local_rank < devices:
        return
    ranks = local_world_size()
    raise SetupError(
        f"{ranks} ranks on a machine where rank {local_rank} sees {devices} GPU{'s' if devices > 1 else ''}",
        remedy=f"start at most {devices} (--num_gpus, --nproc_per_node, --ntasks-per-node); where each process is "
        "given one GPU (srun --gpus-per-task, --gpu-bind; CUDA_VISIBLE_DEVICES), let every process see all of them",
    )


def _give_up_meeting() -> None:
    rank, world_size = logs.rank_and_world_size()
    error = SetupError(
        f"rank {rank}: after {MEET_SECONDS:.0f} s not all of the {world_size} ranks have come to "
        f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
        remedy="see the other ranks' messages: one has failed at its start, or cannot reach that address and port",
    )
    os._exit(report_error(error))


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Around the opening of the process group: no waiting for ever for a rank that never comes. Raises SetupError."""
    check_devices()
    if logs.rank_and_world_size()[1] == 1:
        yield
        return
    from torch.distributed import DistError

    # A thread can end the process though its main thread waits in a library.
    alarm = threading.Timer(MEET_SECONDS, _give_up_meeting)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    except DistError as error:
        raise SetupError(
            f"the ranks cannot meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
            f"{str(error).splitlines()[0]}",
            remedy="the address must be that of rank 0's machine, and the port free there and reachable",
        ) from None
    finally:
        alarm.cancel()


def report_to_launcher(message: str) -> None:
    """Leave this rank's error where the launcher looks for it, if it does."""
    path = os.environ.get(ERROR_FILE)
    if path:
        data = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        try:
            Path(path).write_text(json.dumps(data), "utf-8")
        except OSError as error:
            logs.get_logger().warning("%s: %s", path, error.strerror)


def alone_with_it() -> bool:
    """Whether this rank's launcher does not end it for another's error soon: then the others have not found the same.
    Launchers that read ERROR_FILE show what is there."""
    if ERROR_FILE in os.environ:
        return False
    time.sleep(ALONE_SECONDS)
    return True


def stand_alone_environment() -> None:
    """DeepSpeed needs a launcher's environment even for one process: give it one where none did."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    alone: dict[str, Any] = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in alone.items()})


def build_no_cpu_ops() -> None:
    """Without an accelerator, let DeepSpeed compile nothing at the start."""
    if has_accelerator():
        return
    import deepspeed.ops

    # Only inference uses DeepSpeed's shared-memory all-reduce, yet it would be compiled (a minute) at every start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def join_ranks() -> None:
    """Let DeepSpeed know the process group, which on a CPU accelerate opens without it. Before a model is loaded:
    its partitioned initialisation would otherwise see one rank."""
    import deepspeed

    deepspeed.init_distributed(dist_backend=None if has_accelerator() else "gloo", verbose=False)


def have_met() -> bool:
    """Whether this process is in a process group."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def leave_ranks() -> None:
    import torch.distributed as dist

    if have_met():
        dist.destroy_process_group()
