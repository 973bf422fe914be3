"""How fast is `dft-prep validate` without a tokenizer, against msgspec's bare decode of the same file?

    python benchmarks/validate.py [--megabytes 600] [--runs 3] [--fields]

Both read the same JSONL file of ordinary conversations; the bare way reads lines and decodes each, in one process, and
looks at nothing. Prints MB a second of whole processes (their start included) for all cores and for one worker, the
ratios, and the peak memory of the largest process for the file and for a quarter of it. The medians of several
alternating runs. --fields: each record has an id and a `meta` object besides.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import sys, msgspec
decode = msgspec.json.Decoder().decode
with open(sys.argv[1], "rb") as file:
    for line in file:
        decode(line)
"""
WORDS = [
    first + second for first in ("", "ka", "lo", "mi", "tan", "vol") for second in ("re", "su", "ne", "bre", "chi")
]
ASIDES = ("\n\n", ' "so to speak" ', "\n- ", " \\frac{1}{2} ", " — ", " 你好 ", "\n```python\nx = [1]\n```\n")


def text(chance: random.Random, words: int) -> str:
    parts = [" ".join(chance.choices(WORDS, k=words // 4)) for _ in range(4)]
    return "".join(part + chance.choice(ASIDES if chance.random() < 0.5 else (". ",)) for part in parts).strip()


def write_corpus(path: Path, size: int, fields: bool) -> None:
    """About `size` bytes of conversations of two to six turns, some 1.6 kB each."""
    chance = random.Random(0)
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            messages = []
            for _ in range(chance.choice((1, 1, 2, 3))):
                messages.append({"role": "user", "content": text(chance, chance.randint(12, 60))})
                messages.append({"role": "assistant", "content": text(chance, chance.randint(60, 240))})
            record = {"id": number, "messages": messages, "meta": {"source": "x"}} if fields else {"messages": messages}
            line = json.dumps(record, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            number += 1


def seconds_of(words: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def validate(path: Path, *flags: str) -> float:
    return seconds_of(["-m", "dft_prep", "validate", "--data_files", str(path), *flags])


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--fields", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        corpus, quarter = Path(temporary) / "corpus.jsonl", Path(temporary) / "quarter.jsonl"
        write_corpus(quarter, arguments.megabytes * 250_000, arguments.fields)
        write_corpus(corpus, arguments.megabytes * 1_000_000, arguments.fields)
        size = corpus.stat().st_size / 1e6
        validate(quarter)
        small = peak()
        runs = [
            (
                seconds_of(["-c", BARE, str(corpus)]),
                validate(corpus),
                validate(corpus, "--preprocessing_num_workers", "1"),
            )
            for _ in range(arguments.runs)
        ]
        large = peak()
    bare, ours, single = (size / statistics.median(times) for times in zip(*runs, strict=True))
    print(f"msgspec, bare decode          {bare:6.0f} MB/s")
    print(f"dft-prep validate, all cores  {ours:6.0f} MB/s, ratio {ours / bare:.2f}")
    print(f"dft-prep validate, one worker {single:6.0f} MB/s, ratio {single / bare:.2f}")
    print(f"peak of one process {large:.0f} MB (a quarter of the file: {small:.0f} MB)")


if __name__ == "__main__":
    main()
