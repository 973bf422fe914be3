"""A base model without chat tokens: `--add_chatml_tokens`, training, and a chat with transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import tiny

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def base_tokenizer() -> Tokenizer:
    """The tiny tokenizer as if ChatML's tokens had never been added."""
    parsed = json.loads(tiny.byte_tokenizer().to_str())
    kept = [token for token in parsed["added_tokens"] if token["content"] not in CHATML_TOKENS]
    for number, token in enumerate(kept):
        token["id"] = len(parsed["model"]["vocab"]) + number
    parsed["added_tokens"] = kept
    return Tokenizer.from_str(json.dumps(parsed))


def write_base_model(directory: Path) -> Path:
    """With a special_tokens_map.json and a generation_config.json that know nothing of chats, as older ones have."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = base_tokenizer()
    end = tokenizer.token_to_id("<|endoftext|>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=end, pad_token_id=end, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tiny.write_tokenizer(directory, None, tokenizer)
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config_file = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config_file))
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    return directory


@pytest.mark.slow
def test_a_base_model_learns_to_chat_and_to_stop(dft_prep, tmp_path):
    model = write_base_model(tmp_path / "model")
    replies = {"ping": "pong", "tick": "tock"}
    records = [{"messages": tiny.turns(f"{word} {at}", replies[word])} for at in range(40) for word in ("ping", "tick")]
    done = dft_prep(
        "build", "--data_files", tiny.write_jsonl(tmp_path / "chats.jsonl", records), "--tokenizer", model,
        "--add_chatml_tokens", "--output_dir", tmp_path / "data", "--max_length", 64,
        "--preprocessing_num_workers", 1,
    )  # fmt: skip
    assert "turns end in" not in done.stderr, "<|im_end|> has become the eos_token"
    words = [
        sys.executable, "-m", "dft_train", "--dataset_dir", tmp_path / "data", "--model_name_or_path", model,
        "--output_dir", tmp_path / "run", "--max_steps", 60, "--learning_rate", 1e-2, "--report_to", "none",
        "--per_device_train_batch_size", 8, "--save_strategy", "no", "--objective", "sft",
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    trained = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, env=environment, check=False
    )
    assert trained.returncode == 0, trained.stderr[-4000:]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert loaded.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(model)) + 2
    assert tokenizer.eos_token == "<|im_end|>"
    start = len(tokenizer) - 2
    assert tokenizer.convert_tokens_to_ids(list(CHATML_TOKENS)) == [start, start + 1]
    assert loaded.generation_config.eos_token_id == [tokenizer.pad_token_id, tokenizer.eos_token_id]
    for word, reply in replies.items():
        prompt = tokenizer.apply_chat_template(
            tiny.turns(f"{word} 7"), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = loaded.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(out) == reply + "<|im_end|>"
