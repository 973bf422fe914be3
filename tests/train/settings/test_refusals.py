"""What is refused before a model is loaded: one message, a remedy, the right exit code, no traceback."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dft_common.errors import SetupError
from dft_train.models.load import _check_precision
from dft_train.ranks import launch
from dft_train.settings import checks
from train import handmade


@pytest.fixture
def copied(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copied"))


@pytest.fixture
def attempt(train_here, qwen3, tmp_path):
    """Try to train one step on a dataset: (exit code, stderr)."""

    def run(data: Path, *more: object, model: Path = qwen3) -> tuple[int, str]:
        return train_here(
            "--dataset_dir", data, "--model_name_or_path", model, "--output_dir", tmp_path / "run", "--max_steps", 1,
            "--save_strategy", "no", *more,
        )  # fmt: skip

    return run


def refused(outcome: tuple[int, str], code: int, *texts: str) -> None:
    found, error = outcome
    assert found == code, error
    assert error.count("error: ") == 1 and "what to do: " in error, error
    assert "loaded in" not in error
    for text in texts:
        assert text in error, error


def test_a_dataset_that_is_none(attempt, copied, tmp_path):
    (copied / "manifest.json").unlink()
    refused(attempt(copied), 1, "no manifest.json", "dft-prep build")
    refused(attempt(tmp_path / "nowhere"), 1, "no such dataset directory")


def test_an_output_dir_that_cannot_be_written_to(attempt, dataset, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "run"):
        refused(attempt(dataset, "--output_dir", path), 2, f"--output_dir {path}: ", "it is a file")
    # Root may write wherever the file system lets it.
    monkeypatch.setattr(checks.os, "access", lambda path, mode: Path(path) != tmp_path)
    refused(attempt(dataset, "--output_dir", tmp_path / "new" / "run"), 2, f"{tmp_path}: it cannot be written to")


def test_the_best_of_checkpoints_that_deepspeed_cannot_read(attempt, dataset, zero3_float32):
    flags = ("--save_only_model", "True", "--load_best_model_at_end", "True", "--deepspeed", zero3_float32)
    refused(attempt(dataset, *flags), 2, "--load_best_model_at_end True: DeepSpeed")


def test_a_shard_of_another_size(attempt, copied):
    shard = copied / "train" / "data-00000-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(attempt(copied), 1, str(shard), "in the manifest")
    shard.unlink()
    refused(attempt(copied), 1, "the shard is missing")


def test_a_shard_with_other_content_is_found_when_it_is_read(attempt, copied):
    shard = copied / "train" / "data-00001-of-00002.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, error = attempt(copied, "--num_train_epochs", 1, "--max_steps", -1)
    assert code == 1 and f"{shard}: checksum" in error and "dft-prep verify" in error


def test_a_damaged_pack_index(attempt, copied):
    path = next((copied / "packs").glob("train-*.arrow"))
    path.write_bytes(path.read_bytes() + b"x")
    refused(attempt(copied), 1, "the pack index is damaged")


def changed_tokenizer(model: Path, to: Path, change) -> Path:
    shutil.copytree(model, to)
    path = to / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))
    return to


def test_a_tokenizer_that_means_something_else(attempt, dataset, qwen3, tmp_path):
    def swap(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    other = changed_tokenizer(qwen3, tmp_path / "other", swap)
    refused(attempt(dataset, model=other), 1, "vocabulary: 2 differ", f"--tokenizer {other}", "--overwrite")

    def no_end(tokenizer):
        tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != handmade.END]

    other = changed_tokenizer(qwen3, tmp_path / "no-end", no_end)
    refused(attempt(dataset, model=other), 1, "only the dataset has '<|im_end|>'")


def test_a_tokenizer_written_otherwise_means_the_same(attempt, dataset, qwen3, tmp_path):
    def rewrite(tokenizer):
        tokenizer["model"]["vocab"] = dict(reversed(tokenizer["model"]["vocab"].items()))

    code, error = attempt(dataset, model=changed_tokenizer(qwen3, tmp_path / "same", rewrite))
    assert code == 0, error


def test_another_template_is_a_warning_and_the_datasets_is_kept(attempt, dataset, qwen3, tmp_path):
    other = Path(shutil.copytree(qwen3, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    code, error = attempt(dataset, model=other)
    assert code == 0 and error.count("another chat template") == 1
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == handmade.TEMPLATE


def test_a_model_without_a_tokenizer_is_a_warning(attempt, dataset, qwen3, tmp_path):
    bare = Path(shutil.copytree(qwen3, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    code, error = attempt(dataset, model=bare)
    assert code == 0 and "cannot be compared" in error


def test_a_vocabulary_that_does_not_fit(attempt, dataset, tmp_path):
    small = handmade.write_model(tmp_path / "small", "qwen3", vocab=200, eos_token_id=1, pad_token_id=1)
    refused(attempt(dataset, model=small), 1, "259 ids", "embeddings for 200")


def test_tokens_that_the_build_added_get_embeddings(attempt, rows, qwen3, tmp_path):
    data = handmade.write_dataset(tmp_path / "added", *rows, added=("<|extra|>", "<|more|>"))
    code, error = attempt(data)
    assert code == 0 and "resized to 261 rows" in error
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.get_output_embeddings().weight.shape[0] == 261
    # A checkpoint of such a run has them already, and is what the dataset was made with.
    code, error = attempt(data, model=tmp_path / "run")
    assert code == 0 and "resized" not in error


@pytest.mark.parametrize("token_id", [handmade.VOCAB, handmade.VOCAB + 1])
def test_an_added_token_that_the_models_vocabulary_holds_must_have_its_id(token_id, attempt, rows, qwen3, tmp_path):
    def with_extra(tokenizer):
        tokenizer["model"]["vocab"]["<|extra|>"] = token_id

    data = handmade.write_dataset(tmp_path / "added", *rows, added=("<|extra|>",))
    outcome = attempt(data, model=changed_tokenizer(qwen3, tmp_path / "other", with_extra))
    if token_id == handmade.VOCAB:
        assert outcome[0] == 0, outcome[1]
    else:
        refused(outcome, 1, "vocabulary: 1 differ", "<|extra|>")


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        (("--learnig_rate", 1), ("unknown flag --learnig_rate (did you mean --learning_rate?)",)),
        (("--warmup-ration", 1), ("did you mean --warmup_ratio?",)),
        (("--attn_implementation", "flex_attention"), ("expected one of sdpa, eager, flash_attention_2",)),
        (("--report_to", "tensorbord"), ("did you mean tensorboard?",)),
        (("--label_smoothing_factor", 0.1), ("not supported",)),
        (("--torch_compile_backend", "eager"), ("not supported", "loss inside the head")),
        (("--torch_compile_mode", "default"), ("not supported", "loss inside the head")),
        (("--lr_scheduler_type", "spiral"), ("spiral is not a valid",)),
        (("--deepspeed", "nowhere.json"), ("No such file",)),
        (("--resume_from_checkpoint", "nowhere"), ("no such directory",)),
        (("--model_name_or_path", "./nowhere"), ("no such directory",)),
    ],
)
def test_a_wrong_command_line(flags, texts, attempt, dataset):
    refused(attempt(dataset, *flags), 2, *texts)


def test_neither_or_both_datasets(train_here, qwen3, dataset, tmp_path):
    common = ("--model_name_or_path", qwen3, "--output_dir", tmp_path / "run")
    refused(train_here(*common), 2, "found neither")
    refused(train_here(*common, "--dataset_dir", dataset, "--data_files", "a.jsonl"), 2, "found both")


def test_a_length_without_an_index(attempt, dataset):
    refused(attempt(dataset, "--max_length", 128), 1, "no pack index", "dft-prep pack", "--max_length 128")


def test_longer_than_the_model_is_a_warning(attempt, rows, tmp_path, tokenizer):
    short = handmade.write_model(tmp_path / "short", "qwen3", max_position_embeddings=32)
    data = handmade.write_dataset(tmp_path / "data", *rows)
    code, error = attempt(data, model=short)
    assert code == 0 and "up to 64 tokens" in error and "positions up to 32" in error


def test_flags_of_a_build_change_nothing_with_a_dataset(attempt, dataset):
    code, error = attempt(dataset, "--deduplicate", "False")
    assert code == 0 and "--deduplicate only take part in a build" in error


def test_a_dry_run_trains_nothing(attempt, dataset, tmp_path):
    code, error = attempt(dataset, "--dry_run", "--per_device_train_batch_size", 2)
    assert code == 0
    assert "2 packs a step" in error and "GiB" in error and "parameters" in error
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_sixteen_bits_without_deepspeed_are_warned_of(attempt, dataset):
    code, error = attempt(dataset, "--torch_dtype", "bfloat16")
    assert code == 0 and "no float32 copy" in error
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def with_flash_attn(monkeypatch):
    """As on a machine with a GPU and flash-attn."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "flash_attn" or find(name, *more))
    monkeypatch.setattr(launch, "has_accelerator", lambda: True)


def flash(model: str, *, torch_dtype=None, config_dtype=None, **training) -> str:
    settings = SimpleNamespace(attn_implementation="flash_attention_2", torch_dtype=torch_dtype, training=training)
    return checks.choose_attention(settings, AutoConfig.for_model(model, dtype=config_dtype))


@pytest.mark.parametrize(
    "given",
    [
        {"bf16": True},
        {"torch_dtype": "bfloat16"},
        {"torch_dtype": "auto", "config_dtype": "float16"},
        {"deepspeed": '{"bf16": {"enabled": true}}'},
    ],
    ids=["bf16", "torch_dtype", "auto", "deepspeed"],
)
def test_flash_attention_in_16_bits_is_taken(given, with_flash_attn):
    assert flash("qwen3", **given) == "flash_attention_2"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"torch_dtype": "auto", "config_dtype": "float32"},
        {"torch_dtype": "float32", "deepspeed": '{"bf16": {"enabled": true}}'},
    ],
    ids=["neither", "auto", "float32-wins"],
)
def test_flash_attention_in_float32_is_refused(given, with_flash_attn):
    with pytest.raises(SetupError, match="takes 16 bits alone, and this run computes in float32"):
        flash("qwen3", **given)


def test_flash_attention_that_the_model_does_not_know_is_refused(with_flash_attn):
    with pytest.raises(SetupError, match="BloomForCausalLM does not work with it"):
        flash("bloom", bf16=True)


def test_float16_weights_that_loss_scaling_cannot_train_are_refused():
    settings, args = SimpleNamespace(eval_only=False), SimpleNamespace(deepspeed=None, fp16=True)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    with pytest.raises(SetupError, match="torch scales no gradients of float16"):
        _check_precision(settings, args, weight)
    # What torch says, in the first step.
    weight.sum().backward()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.unscale_(torch.optim.SGD([weight]))
    _check_precision(settings, args, torch.nn.Parameter(torch.ones(1)))
