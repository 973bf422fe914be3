"""What does the loss cost? Time and memory against all logits and autograd, and against three bare products.

python benchmarks/loss.py [--tokens 4096] [--vocab 50000] [--width 1024] [--live 0.5] [--rounds 3] [--dtype float32]
    [--threads 2]
Each way is measured in turn, several rounds, the best of each counts: wall-clock time, or with `--threads 1` CPU time,
which a busy machine hardly changes. Memory is what the process holds at its peak
beyond inputs and gradients. Three bare products: of the live rows alone,
logits, dX and dW, with nothing between them, in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from dft_train.loss import linear_dft_loss

KIB = 1024
MIB = 1 << 20
ALPHA = 0.7


class Problem:
    """Hidden states, a head and labels, of which a part is live."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, arguments.dtype)
        make = {"device": arguments.device, "dtype": dtype}
        self.hidden = torch.randn(arguments.tokens, arguments.width, **make).requires_grad_()
        self.weight = (torch.randn(arguments.vocab, arguments.width, **make) * 0.02).requires_grad_()
        self.labels = torch.randint(arguments.vocab, (arguments.tokens,), device=arguments.device)
        self.labels[torch.rand(arguments.tokens, device=arguments.device) >= arguments.live] = -100
        self.live = torch.nonzero(self.labels != -100).squeeze(1)

    def backward(self, loss: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        loss.backward()

    def fused(self, objective: str = "dft") -> None:
        self.backward(linear_dft_loss(self.hidden, self.weight, self.labels, objective=objective)[0])

    def reference(self) -> None:
        """`--fused_loss off`, statistics and all."""
        self.backward(linear_dft_loss(self.hidden, self.weight, self.labels, fused="off")[0])

    def dense(self) -> None:
        """The least that all logits and autograd can do: no statistics."""
        ce = cross_entropy(linear(self.hidden.float(), self.weight.float()), self.labels, reduction="none")
        weight = torch.exp(-ce.detach()) * ALPHA + 1 - ALPHA
        self.backward((ce * weight).sum() / len(self.live))

    def sft(self) -> None:
        """What transformers does: the mean cross entropy."""
        logits = linear(self.hidden, self.weight).float()
        self.backward(cross_entropy(logits, self.labels, reduction="sum") / len(self.live))

    def products(self) -> None:
        x, w = self.hidden.detach()[self.live].float(), self.weight.detach().float()
        logits = x @ w.T
        logits @ w
        logits.T @ x


def seconds(problem: Problem, work: Callable[[], None]) -> float:
    gc.collect()
    problem.hidden.grad = problem.weight.grad = None
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    work()
    if problem.hidden.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * KIB


def extra_bytes(problem: Problem, work: Callable[[], None]) -> int:
    """Peak memory of one forward and backward pass beyond inputs and gradients."""
    gc.collect()
    problem.hidden.grad = problem.weight.grad = None
    on_gpu = problem.hidden.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() if on_gpu else _status("VmRSS")
    work()
    peak = torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")
    return peak - before - sum(leaf.grad.nbytes for leaf in (problem.hidden, problem.weight) if leaf.grad is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("vocab", 50_000), ("width", 1024), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--live", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments)
    ways = {"fused": problem.fused, "eaft": lambda: problem.fused("eaft"), "dense": problem.dense}
    ways |= {"dense sft": problem.sft, "fused off": problem.reference}
    problem.products()
    extra = {name: extra_bytes(problem, work) for name, work in ways.items()}
    ways["products"] = problem.products
    times = {name: float("inf") for name in ways}
    for _ in range(arguments.rounds):
        for name, work in ways.items():
            times[name] = min(times[name], seconds(problem, work))
    live = len(problem.live)
    print(f"{arguments.tokens:,} tokens, {live:,} live, {arguments.vocab:,} x {arguments.width:,} {arguments.dtype}")
    for name in ways:
        against = "  ".join(f"{times[name] / times[other]:.2f} x {other}" for other in ("dense", "products"))
        memory = (
            f"{extra[name] / MIB:7.0f} MiB extra, {extra[name] / extra['dense']:.3f} x dense" if name in extra else ""
        )
        print(f"{name:>10}: {times[name]:7.3f} s  {against}  {memory}")


if __name__ == "__main__":
    main()
