"""How full are the packs, packed in blocks of 65,536 rows, against packing all rows at once?

python benchmarks/packing.py [--rows 500000] [--max_length 8192]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from dft_prep.shards.pack import BLOCK_ROWS, best_fit_decreasing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--max_length", type=int, default=8192)
    arguments = parser.parse_args()
    normal = np.random.default_rng(0).normal(6, 1, arguments.rows)
    lengths = np.minimum(arguments.max_length, np.exp(normal).astype(np.int64) + 2)
    for name, block in (("all at once", arguments.rows), ("our blocks", BLOCK_ROWS), ("windows of 1,000", 1000)):
        started = time.perf_counter()
        bins = sum(
            len(best_fit_decreasing(lengths[at : at + block], arguments.max_length))
            for at in range(0, len(lengths), block)
        )
        seconds = time.perf_counter() - started
        fill = lengths.sum() / (bins * arguments.max_length)
        print(f"{name:>17}: {bins:,} packs, {100 * fill:.3f} % full, {arguments.rows / seconds:,.0f} rows/s")


if __name__ == "__main__":
    main()
