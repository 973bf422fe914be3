"""The user's own script, examples/train.sh, on three GSM8K files, with a tiny model on two CPU ranks."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared"
FILES = ("gsm8k_plain.jsonl", "gsm8k_system_meta.jsonl", "gsm8k_parts_array.json")
# What a CPU and a test's patience ask for; every other flag stays as the script has it.
CHANGED = {
    "--torch_dtype": "float32",
    "--bf16": "False",
    "--max_length": "512",
    "--preprocessing_num_workers": "2",
    "--learning_rate": "1e-2",
    "--gradient_accumulation_steps": "1",
    "--eval_steps": "10",
    "--save_steps": "10",
    "--logging_steps": "5",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "sources").is_dir(), reason="the shared data is not here"),
]


def script_flags(model: Path, out: Path, logs: Path) -> list[str]:
    """The flags of examples/train.sh with its variables filled in."""
    script = (REPO / "examples" / "train.sh").read_text("utf-8")
    command = re.search(r"--module dft_train \\\n(.*?)\n\n", script, re.DOTALL)
    assert command is not None
    text = (
        command[1]
        .replace("\\\n", " ")
        .replace('"${DATA_FILES[@]}"', " ".join(str(SHARED / "sources" / f) for f in FILES))
    )
    text = text.replace("${OUTPUT_DIR}", str(out)).replace("${LOG_DIR}", str(logs))
    words = shlex.split(text.replace("/path/to/your/base_model", str(model)))
    for flag, value in CHANGED.items():
        words[words.index(flag) + 1] = value
    return words


def test_the_users_script_trains(tmp_path):
    torch = pytest.importorskip("torch")
    import shutil

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    model = tmp_path / "model"
    shutil.copytree(SHARED / "tokenizers" / "phi2-chatml", model)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=51200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(model)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--module", "dft_train"]
    command += [*script_flags(model, out, tmp_path / "logs"), "--max_steps", "30"]
    environment = {**os.environ, "SWANLAB_MODE": "local", "TOKENIZERS_PARALLELISM": "false"}
    environment["SWANLAB_LOG_DIR"] = str(tmp_path / "swanlab")
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
    names = {name for entry in history for name in entry}
    assert names >= {
        "loss", "ce_loss", "avg_p_correct", "token_accuracy", "dft_alpha", "grad_norm", "learning_rate",
        "tokens_seen", "tokens_per_second", "eval_loss", "eval_ce_loss", "eval_avg_p_correct",
    }  # fmt: skip
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))]
    assert len(moved) >= 0.9 * len(before)
    assert len(list(out.glob("checkpoint-*"))) == 3
    loaded = AutoModelForCausalLM.from_pretrained(out / "checkpoint-30")
    assert loaded.generation_config.eos_token_id is not None
    assert AutoTokenizer.from_pretrained(out).chat_template
