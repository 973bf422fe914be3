"""The process's surroundings: launcher environment, DeepSpeed on a CPU, and what other libraries may print.

Called by `trainer` before and after TrainingArguments exist. Without an accelerator the ranks talk through gloo.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from typing import Any

from dft_common import logs

NOISY = ("DeepSpeed", "deepspeed", "accelerate", "datasets", "torch.distributed", "torch.utils.cpp_extension")
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


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def stand_alone_environment() -> None:
    """DeepSpeed needs a launcher's environment even for one process: give it one where none did."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    alone: dict[str, Any] = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
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


def leave_ranks() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
