"""What all ranks must decide alike: sums of a few numbers over the ranks, asked for before they are needed.

`ask` starts a small sum on the CPU (gloo) at the beginning of a step's last micro-batch, `answer` takes it at the
step's end: in between the device is given its work, so nobody waits. Whoever asked must take the answer before the
next question, and the order of questions is the same on every rank. Used by `faults`.
"""

from __future__ import annotations

import datetime
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dft_common.errors import SetupError
from dft_train.ranks.launch import have_met

T = TypeVar("T")


def _cpu_group(timeout: datetime.timedelta | None) -> Any:
    """A process group of all ranks for numbers on the CPU, None for a single rank. Raises SetupError."""
    if not have_met() or dist.get_world_size() == 1:
        return None
    try:
        return dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise SetupError(
            f"the ranks cannot talk through gloo: {first}",
            remedy="name the network interface that joins the nodes: GLOO_SOCKET_IFNAME=eth0 or the like (`ip addr` "
            "lists them)",
        ) from None


class Agreement:
    """One open question at a time. For a single rank the answer is what was asked.

    timeout: how long a rank waits for the others, as while rank 0 writes a checkpoint; by default torch's.
    """

    def __init__(self, timeout: datetime.timedelta | None = None) -> None:
        self._group = _cpu_group(timeout)
        self._open: tuple[torch.Tensor, Any] | None = None

    def ask(self, *numbers: float) -> None:
        """Start to sum `numbers`, as many on every rank. Returns at once."""
        assert self._open is None, "the last answer was not taken"
        sums = torch.tensor(numbers, dtype=torch.float64)
        work = None if self._group is None else dist.all_reduce(sums, group=self._group, async_op=True)
        self._open = sums, work

    def answer(self) -> list[float]:
        """The sums over all ranks of what was asked last; the same on every rank. Waits for the slowest to ask."""
        assert self._open is not None, "nothing was asked"
        (sums, work), self._open = self._open, None
        if work is not None:
            work.wait()
        return sums.tolist()

    def sum_now(self, *numbers: float) -> list[float]:
        self.ask(*numbers)
        return self.answer()

    @property
    def is_open(self) -> bool:
        """Whether a question was asked and its answer not taken."""
        return self._open is not None

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in the order of the ranks. For what is rare: it waits."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self._group)
        return found
