"""`make demo`: the whole road, from messy files to a trained tiny model that answers, in a few minutes on a CPU.

Every command is printed before it runs, so that you can copy it. The demo checks itself: it fails if fewer than
9 in 10 held-out prompts are answered rightly.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo_corpus import write_corpus, write_model, write_tokenizer

ZERO3 = os.path.relpath(Path(__file__).resolve().parent.parent / "ds_config" / "zero3.json")
RUN = Path("demo_run")
BIN = Path(sys.executable).parent


def say(text: str) -> None:
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def run(*arguments: object, allowed: tuple[int, ...] = (0,)) -> None:
    """Print a command, run it, and stop the demo where it ends otherwise than expected."""
    words = [str(argument) for argument in arguments]
    print(f"$ {shlex.join(words)}", flush=True)
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "TOKENIZERS_PARALLELISM": "false"}
    code = subprocess.run(words, env=environment, check=False).returncode
    if code not in allowed:
        sys.exit(f"the command ended with exit code {code}")


def prepare() -> None:
    say("1. A small corpus of four shapes, one file with broken records; a tokenizer; a model with random weights")
    files = write_corpus(RUN / "data")
    write_tokenizer(RUN / "model")
    vocabulary = json.loads((RUN / "model" / "tokenizer.json").read_text("utf-8"))
    write_model(RUN / "model", len(vocabulary["model"]["vocab"]) + len(vocabulary["added_tokens"]))
    for file in files:
        print(f"{file}  {file.stat().st_size:,} bytes")


def build() -> None:
    say("2. Validate: what is wrong with the data? (exit code 1: there are errors, as a CI job would see)")
    run("dft-prep", "validate", "--data_files", RUN / "data", allowed=(1,))
    say("3. Build: good records become a packed dataset, bad ones go to the quarantine with their reason")
    run(
        *("dft-prep", "build", "--data_files", *sorted((RUN / "data").iterdir()), "--tokenizer", RUN / "model"),
        *("--output_dir", RUN / "dataset", "--max_length", "512", "--validation_split_percentage", "8"),
    )
    print("\nquarantine.jsonl:")
    for line in (RUN / "dataset" / "quarantine.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        print(f"  {entry['file']}:{entry['line']}: {entry['code']} {entry['message']}")
    say("4. Inspect: what will be trained? (trained text in green, or in ⟦ ⟧)")
    run("dft-prep", "inspect", RUN / "dataset", "--row", "0")
    run("dft-prep", "verify", RUN / "dataset")


def train() -> None:
    say("5. Train: DeepSpeed ZeRO-3, two CPU ranks, the DFT loss")
    run(
        *("deepspeed", "--num_gpus=2", "--module", "dft_train", "--dataset_dir", RUN / "dataset"),
        *("--model_name_or_path", RUN / "model", "--output_dir", RUN / "checkpoint", "--torch_dtype", "float32"),
        *("--attn_implementation", "sdpa", "--deepspeed", ZERO3, "--bf16", "False", "--dft_alpha", "0.7"),
        *("--max_length", "512", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
        *("--num_train_epochs", "36", "--learning_rate", "4e-3", "--lr_scheduler_type", "cosine"),
        *("--warmup_ratio", "0.05", "--weight_decay", "0.01", "--logging_steps", "20", "--eval_on_start", "True"),
        *("--eval_strategy", "steps", "--eval_steps", "100", "--save_strategy", "no", "--save_only_model", "True"),
        *("--enable_gradient_checkpointing", "False", "--report_to", "none"),
        *("--remove_unused_columns", "False", "--ddp_find_unused_parameters", "False"),
    )


def show_losses() -> None:
    say("6. Loss on the validation split, before and after")
    history = json.loads((RUN / "checkpoint" / "trainer_state.json").read_text("utf-8"))["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    for name, entry in (("before", evaluations[0]), ("after", evaluations[-1])):
        print(
            f"{name:>7}: loss {entry['eval_loss']:.4f}, cross-entropy {entry['eval_ce_loss']:.4f}, "
            f"mean probability of the right token {entry['eval_avg_p_correct']:.3f}"
        )


def held_out_prompts() -> list[tuple[list[int], list[int]]]:
    """(prompt, reply) of every conversation of the validation split, as token ids, through `datasets`."""
    from datasets import load_from_disk

    pairs = []
    for row in load_from_disk(str(RUN / "dataset"))["validation"]:
        first = row["assistant_masks"].index(True)
        reply = [token for token, trained in zip(row["input_ids"], row["assistant_masks"], strict=True) if trained]
        pairs.append((row["input_ids"][:first], reply))
    return pairs


def ask() -> None:
    say("7. The trained model answers held-out prompts, by greedy generation")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(RUN / "checkpoint", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(RUN / "checkpoint")
    pairs = held_out_prompts()
    right = 0
    for number, (prompt, reply) in enumerate(pairs):
        inputs = torch.tensor([prompt])
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=40, do_sample=False)
        answer = out[0, len(prompt) :].tolist()
        right += answer == reply
        if number < 8 or answer != reply:
            verdict = "right" if answer == reply else "WRONG"
            question = tokenizer.decode(prompt).splitlines()[1].removesuffix("<|im_end|>")
            print(f"  {verdict}: {question} -> {tokenizer.decode(answer)}")
    print(f"{right} of {len(pairs)} held-out prompts answered rightly")
    if right < 0.9 * len(pairs):
        sys.exit("the demo failed: fewer than 9 in 10 held-out prompts were answered rightly")


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    prepare()
    build()
    train()
    show_losses()
    ask()
    print(f"\nthe demo took {time.monotonic() - started:.0f} s; everything is in {RUN}/")


if __name__ == "__main__":
    main()
