"""How long does `--help` take? Ratios to starting Python alone, best of seven.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import time


def best(arguments: list[str], runs: int = 7) -> float:
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    python = best(["-c", "pass"])
    print(f"python alone      {python:.3f} s")
    for module in ("dft_prep", "dft_train"):
        seconds = best(["-m", module, "--help"])
        print(f"{module.replace('_', '-')} --help  {seconds:.3f} s  ({seconds / python:.1f} x)")


if __name__ == "__main__":
    main()
