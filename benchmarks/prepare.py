"""How fast is `dft-prep build`, against the tokenizers library alone on the same texts and cores?

    python benchmarks/prepare.py [--megabytes 60] [--tokenizer DIR]

Prints tokens a second of a whole build (JSON, template, mask, tokens, deduplication, shards, pack index), of
`Tokenizer.encode_batch_fast` on the bare texts, and their ratio, all measured in one run; and the peak memory
of the build's processes for the corpus and for a quarter of it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tokenizers import Tokenizer

import tiny

SYLLABLES = ("ka", "lo", "mi", "re", "su", "tan", "ne", "vol", "bre", "chi")
WORDS = [first + second for first in ("", *SYLLABLES) for second in SYLLABLES]


def write_corpus(path: Path, size: int) -> list[str]:
    """About `size` bytes of two-turn conversations of random words; returns their texts."""
    chance = random.Random(0)
    texts: list[str] = []
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            lengths = (chance.randint(10, 60), chance.randint(40, 200))
            user, reply = (" ".join(chance.choices(WORDS, k=k)).capitalize() + f" {chance.random()}." for k in lengths)
            line = json.dumps({"messages": tiny.turns(user, reply)}) + "\n"
            file.write(line)
            texts += [user, reply]
            written += len(line)
    return texts


def build(corpus: Path, tokenizer: Path, out: Path) -> tuple[float, int, float]:
    """(seconds, tokens, peak MB of the largest process) of one build."""
    words = ["build", "--data_files", corpus, "--tokenizer", tokenizer, "--output_dir", out]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dft_prep", *map(str, words)], check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    tokens = json.loads((out / "manifest.json").read_text("utf-8"))["counts"]["tokens"]
    return seconds, tokens, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def bare(texts: list[str], tokenizer: Path) -> tuple[float, int]:
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    started = time.perf_counter()
    tokens = 0
    for at in range(0, len(texts), 2000):
        tokens += sum(len(item) for item in encoder.encode_batch_fast(texts[at : at + 2000], add_special_tokens=False))
    return time.perf_counter() - started, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--tokenizer", type=Path, help="default: a small byte-level BPE, made here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tokenizer = arguments.tokenizer or tiny.write_tokenizer(root / "tokenizer")
        write_corpus(root / "quarter.jsonl", arguments.megabytes * 250_000)
        texts = write_corpus(root / "corpus.jsonl", arguments.megabytes * 1_000_000)
        _, _, small = build(root / "quarter.jsonl", tokenizer, root / "out_quarter")
        seconds, tokens, large = build(root / "corpus.jsonl", tokenizer, root / "out")
        bare_seconds, bare_tokens = bare(texts, tokenizer)
    ours, theirs = tokens / seconds, bare_tokens / bare_seconds
    print(f"dft-prep build      {ours / 1e6:6.2f} M tokens/s  ({tokens:,} tokens in {seconds:.1f} s)")
    print(f"bare tokenizers     {theirs / 1e6:6.2f} M tokens/s  (texts alone, no JSON, template, mask or files)")
    print(f"ratio               {ours / theirs:6.2f}")
    print(f"peak of one process {large:6.0f} MB (a quarter of the corpus: {small:.0f} MB)")


if __name__ == "__main__":
    main()
