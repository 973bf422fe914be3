"""The command line: the user's script as it is written, every field of TrainingArguments, no heavy imports."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dft_common.errors import SetupError
from dft_train.cli import main
from dft_train.settings.arguments import OWN_FLAGS, REFUSED, STATIC_FLAGS, TRAINING_FLAGS, Settings
from dft_train.train_command import choose_command

REPO = Path(__file__).resolve().parents[3]


def parse(monkeypatch, *arguments: str) -> Settings:
    """The settings that a command line gives to the run."""
    kept: list[Settings] = []
    import dft_train.trainer

    monkeypatch.setattr(dft_train.trainer, "run", lambda settings: kept.append(settings) or 0)
    command = choose_command(arguments)
    assert command.main(list(arguments), standalone_mode=False) == 0
    return kept[0]


def users_flags() -> list[str]:
    script = (REPO / "examples" / "train.sh").read_text().replace("\\\n", " ")
    line = next(line for line in script.splitlines() if line.startswith("deepspeed"))
    words = shlex.split(line.replace('"${DATA_FILES[@]}"', "a.json b.json").replace("$", ""))
    return words[words.index("dft_train") + 1 :]


def test_the_users_script_as_written(monkeypatch):
    settings = parse(monkeypatch, "--local_rank=3", *users_flags())
    assert settings.model_name_or_path == "/path/to/your/base_model"
    assert settings.build["data_files"] == ("a.json", "b.json")
    assert settings.build["preprocessing_num_workers"] == 8 and settings.build["validation_split_percentage"] == 2.0
    assert (settings.max_length, settings.build["max_length"]) == (8192, 8192)
    assert settings.gradient_checkpointing and settings.trust_remote_code
    assert (str(settings.dft_alpha), settings.warmup_ratio, settings.logging_dir) == ("0.7", 0.05, "{LOG_DIR}")
    assert settings.training == {
        "bf16": True, "num_train_epochs": 1.0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "learning_rate": 2e-6, "lr_scheduler_type": "cosine", "weight_decay": 0.01, "gradient_accumulation_steps": 16,
        "eval_strategy": "steps", "eval_steps": 200.0, "save_strategy": "steps", "save_steps": 200.0,
        "save_total_limit": 3, "save_only_model": True, "report_to": ("swanlab",), "logging_steps": 10.0,
        "deepspeed": "./ds_config/zero3.json", "remove_unused_columns": False, "ddp_find_unused_parameters": False,
    }  # fmt: skip


def test_the_users_script_ends_as_the_training_does(tmp_path):
    launcher = tmp_path / "deepspeed"
    launcher.write_text("#!/bin/sh\necho 'out of memory' >&2\nexit 2\n")
    launcher.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = ["bash", str(REPO / "examples" / "train.sh")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "out of memory" in done.stdout
    (log,) = (tmp_path / "logs").iterdir()
    assert "out of memory" in log.read_text()


COMMON = ("--model_name_or_path", "m", "--output_dir", "o", "--dataset_dir", "d")


def test_any_other_field_of_training_arguments(monkeypatch):
    settings = parse(monkeypatch, *COMMON, "--adam-beta2", "0.95", "--full_determinism", "--tf32", "False")
    assert settings.training == {"adam_beta2": 0.95, "full_determinism": True, "tf32": False}


def test_a_config_file_gives_flags_and_the_command_line_wins(monkeypatch, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("dft_alpha: 0.2\nlearning_rate: 0.5\nadam_beta2: 0.9\nbf16: true\nobjective: dft\n")
    settings = parse(monkeypatch, *COMMON, "--config", str(path), "--dft_alpha", "0.4")
    assert (str(settings.dft_alpha), settings.objective) == ("0.4", "dft")
    assert settings.training == {"learning_rate": 0.5, "adam_beta2": 0.9, "bf16": True}


def test_a_config_key_that_is_nearly_a_flag_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learnig_rate: 0.5\n")
    arguments = [*COMMON, "--config", str(path)]
    with pytest.raises(SetupError, match="learnig_rate"):
        choose_command(arguments).main(arguments, standalone_mode=False)


def test_listed_flags_are_fields_of_training_arguments_of_the_same_kind():
    import dataclasses

    from transformers import TrainingArguments

    from dft_train.settings.training_fields import training_flags

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {flag.name for flag in TRAINING_FLAGS} <= fields
    assert set(REFUSED) <= fields
    assert fields - set(training_flags()) - {flag.name for flag in OWN_FLAGS} == set()


def test_the_flags_of_help_are_frozen():
    names = [flag.name for flag in STATIC_FLAGS]
    assert len(names) == len(set(names))
    assert {"dataset_dir", "data_files", "tokenizer", "chat_template", "overlong", "packing", "seed"} <= set(names)


@pytest.mark.parametrize("words", [["-h"], ["train", "-h"], ["verify", "-h"]])
def test_h_is_help_and_names_the_other_command(words, capsys):
    assert main(words) == 0
    assert "dft-train verify" in " ".join(capsys.readouterr().out.split())


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from dft_train.cli import main; code = main(['--help']); "
        "assert code == 0; heavy = {'torch', 'transformers', 'numpy', 'deepspeed'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dft_alpha" in done.stdout and "--data_files" in done.stdout and "--bf16" in done.stdout
    assert not re.search(r"\[x<=None\]", done.stdout)
