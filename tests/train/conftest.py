"""Models, datasets and ways to run the trainer, shared by the tests of stage 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from train import handmade
from train.rank_server import RankServer

BIN = Path(sys.executable).parent

# Before torch is imported: on matrices this small, threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = handmade.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> Path:
    return handmade.write_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """With tied embeddings."""
    return handmade.write_model(tmp_path_factory.mktemp("models") / "llama", "llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def rows(tokenizer) -> tuple[list[handmade.Conversation], list[handmade.Conversation]]:
    """(train, validation), with weights other than 0 and 1 among them."""
    train = handmade.conversations(tokenizer, 40, weighted=True)
    return train, handmade.conversations(tokenizer, 12, seed=1, weighted=True)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, rows) -> Path:
    """25 packs to train on, so that a step of 4 leaves one pack for the last step of an epoch."""
    return handmade.write_dataset(tmp_path_factory.mktemp("datasets") / "data", *rows)


@pytest.fixture(scope="session")
def zero3_float32(tmp_path_factory) -> Path:
    """ZeRO-3 with nothing kept whole, in float32, so that it can be compared."""
    path = tmp_path_factory.mktemp("ds") / "zero3.json"
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({**dict.fromkeys(auto, "auto"), "bf16": {"enabled": True}, "zero_optimization": zero}))
    return path


@pytest.fixture
def train_here(monkeypatch, capfd) -> Callable[..., tuple[int, str]]:
    """Run `dft-train` in this process (no launcher): (exit code, stderr)."""
    from dft_train.cli import main

    before = dict(os.environ)

    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
        error = capfd.readouterr().err
        assert "Traceback" not in error, error
        return code, error

    return run


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankServer]:
    """Run `dft-train` as ranks of a run, quickly: `ranks(2, flags...)`; see `rank_server`."""
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `dft-train` under a launcher: `launch("torchrun", 2, flags...)`, or "python", or "deepspeed"."""

    def run(
        launcher: str, ranks: int, *arguments: object, env: dict[str, str] | None = None, check: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        starts: dict[str, list[Any]] = {
            "python": [sys.executable, "-m", "dft_train"],
            "torchrun": [BIN / "torchrun", "--standalone", f"--nproc_per_node={ranks}", "-m", "dft_train"],
            "deepspeed": [BIN / "deepspeed", "--master_port=29731", f"--num_gpus={ranks}", "--module", "dft_train"],
        }
        words = [str(word) for word in (*starts[launcher], *arguments)]
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **quiet, "PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})}
        # In a session of its own, so that no rank is left behind where the launcher is killed.
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        try:
            out, error = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, error = process.communicate()
        done = subprocess.CompletedProcess(words, process.returncode, out, error)
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done

    return run
