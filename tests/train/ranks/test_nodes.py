"""Several nodes, stood in for by two launchers on one machine: Slurm's tasks, torchrun's agents, DeepSpeed's hosts."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dft_common.errors import SetupError
from dft_train import bridge
from dft_train.ranks import slurm
from dft_train.ranks.launch import LAUNCH_ID, free_port
from train import handmade
from train.conftest import BIN
from train.settings.test_arguments import REPO, parse

FLAGS = (
    "--max_steps", 3, "--logging_steps", 1, "--learning_rate", 3e-3, "--adam_epsilon", 1e-4,
    "--save_strategy", "no", "--bf16", "False",
)  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("tux", "tux"),
        ("tux1,tux2", "tux1"),
        ("tux[1-4]", "tux1"),
        ("tux[001-004,007],x9", "tux001"),
        ("tux[007,001-004]", "tux007"),
        ("r[1-2]n[01-16],x9", "r1n01"),
        ("a-b-[3,5].cluster,c", "a-b-3.cluster"),
        ("c,tux[1-4]", "c"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert slurm.first_host(nodes) == first


@pytest.mark.parametrize(
    ("text", "counts"), [("2", [2]), ("8(x2)", [8, 8]), ("8(x2),4", [8, 8, 4]), ("1,2(x3)", [1, 2, 2, 2])]
)
def test_tasks_by_node(text, counts):
    assert slurm.tasks_per_node(text) == counts


def task(number: int, *, tasks: int = 16, per_node: str = "8(x2)", nodes: str = "n[3-4]") -> dict[str, str]:
    local = int(per_node.partition("(")[0])
    return {
        "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "1", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number % local),
        "SLURM_NODEID": str(number // local), "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_NTASKS": str(tasks),
    }  # fmt: skip


def test_a_task_is_a_rank():
    first, last = (slurm.rank_environment(task(number)) for number in (0, 13))
    own = {"RANK": "13", "LOCAL_RANK": "5", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "n3"}
    assert own.items() <= last.items()
    assert 1024 < int(first["MASTER_PORT"]) < 32768
    shared = ("MASTER_ADDR", "MASTER_PORT", LAUNCH_ID)
    assert [first[name] for name in shared] == [last[name] for name in shared]


def test_what_the_user_sets_wins_and_a_requeued_job_is_another_launch():
    set_here = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "999"}
    found = slurm.rank_environment({**task(0), **set_here})
    assert set_here.items() <= found.items()
    again = slurm.rank_environment({**task(0), "SLURM_RESTART_COUNT": "1"})
    assert again[LAUNCH_ID] != found[LAUNCH_ID]
    assert slurm.rank_environment({**task(0), "SLURM_STEP_ID": "2"})[LAUNCH_ID] != found[LAUNCH_ID]


def test_a_step_without_nodes():
    with pytest.raises(SetupError, match="on which nodes"):
        slurm.rank_environment(task(0, nodes=""))


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"},  # a batch script
        {**task(0), "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {},
    ],
)
def test_outside_of_a_step_of_several_tasks_nothing_is_taken_up(environment):
    assert not slurm.in_step(environment)


def test_another_launchers_rank_inside_a_step_keeps_its_own(monkeypatch):
    for name, value in {**task(3), "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    slurm.adopt()
    assert os.environ["RANK"] == "1" and "WORLD_SIZE" not in os.environ


def test_ranks_of_several_nodes_wait_for_the_same_build(monkeypatch):
    keys = set()
    for number in (0, 13):
        for name, value in slurm.rank_environment(task(number)).items():
            monkeypatch.setenv(name, value)
        keys.add(bridge.launch_key())
    assert len(keys) == 1


def test_the_example_is_a_command_line_of_ours(monkeypatch):
    script = (REPO / "examples" / "slurm.sbatch").read_text()
    line = next(line for line in script.replace("\\\n", " ").splitlines() if line.startswith("srun"))
    words = shlex.split(line)
    settings = parse(monkeypatch, *words[words.index("dft-train") + 1 :])
    assert settings.resume == "True" and settings.training["deepspeed"] == "ds_config/zero3.json"
    assert (REPO / settings.training["deepspeed"]).is_file()
    assert "--signal=USR1@" in script and "--requeue" in script and "scontrol requeue" in script


# For real


def base(dataset: Path, model: Path, run: Path) -> list[str]:
    common = ("--dataset_dir", dataset, "--model_name_or_path", model, "--output_dir", run, *FLAGS)
    return [str(word) for word in common]


def environment(**more: str) -> dict[str, str]:
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **quiet, "PATH": f"{BIN}:{os.environ['PATH']}", **more}


class Nodes:
    """Commands that run at the same time, one a node. All are ended at the end."""

    def __init__(self, folder: Path) -> None:
        self.processes: list[subprocess.Popen] = []
        self._folder = folder

    def start(self, commands: list[list[str]], environments: list[dict[str, str]]) -> None:
        for at, (command, env) in enumerate(zip(commands, environments, strict=True)):
            with (self._folder / f"node-{at}").open("w") as log:
                process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            self.processes.append(process)

    def output(self, node: int) -> str:
        return (self._folder / f"node-{node}").read_text(errors="replace")

    def wait(self, seconds: float = 240) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def nodes(tmp_path):
    made = Nodes(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="module")
def one_node(tmp_path_factory, ranks, dataset, qwen3) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    ranks(2, *base(dataset, qwen3, run))
    return run


def assert_same(run: Path, other: Path) -> None:
    mine, theirs = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert set(mine) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-6)
    assert handmade.read_state(run)["global_step"] == 3


def test_two_tasks_of_slurm_on_two_nodes(ranks, one_node, dataset, qwen3, tmp_path):
    """Without any launcher but srun."""
    run = tmp_path / "run"
    port = {"MASTER_PORT": str(free_port())}
    started = []
    for number in range(2):
        env = {**task(number, tasks=2, per_node="1(x2)", nodes="127.0.0.1,127.0.0.2"), **port}
        started += ranks.start(1, *base(dataset, qwen3, run), env=env)
    ranks.wait(started)
    assert [rank.returncode for rank in started] == [0, 0], started[0].stderr + started[1].stderr
    assert_same(run, one_node)


@pytest.mark.slow
def test_two_agents_of_torchrun(nodes, one_node, dataset, qwen3, tmp_path):
    run, port = tmp_path / "run", free_port()
    agent = ["torchrun", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    command = [str(BIN / agent[0]), *agent[1:], "-m", "dft_train", *base(dataset, qwen3, run)]
    nodes.start([command, command], [environment(), environment()])
    assert nodes.wait() == [0, 0], nodes.output(0) + nodes.output(1)
    assert_same(run, one_node)


def deepspeed_commands(hostfile: Path, arguments: list[str]) -> list[list[str]]:
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    start = [str(BIN / "deepspeed"), f"--hostfile={hostfile}", "--no_ssh", "--master_addr=127.0.0.1"]
    start += [f"--master_port={free_port()}"]
    return [[*start, f"--node_rank={rank}", "--module", "dft_train", *arguments] for rank in range(2)]


@pytest.mark.slow
def test_two_hosts_of_deepspeed(nodes, one_node, dataset, qwen3, tmp_path, zero3_float32):
    run = tmp_path / "run"
    flags = [*base(dataset, qwen3, run), "--deepspeed", str(zero3_float32)]
    nodes.start(deepspeed_commands(tmp_path / "hosts", flags), [environment(), environment()])
    assert nodes.wait() == [0, 0], nodes.output(0) + nodes.output(1)
    mine, theirs = load_file(run / "model.safetensors"), load_file(one_node / "model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_a_node_that_is_lost_ends_the_other(nodes, dataset, qwen3, tmp_path):
    """Launcher and rank of one host are killed at once: the other learns of it, tells, and ends."""
    flags = [*base(dataset, qwen3, tmp_path / "run"), "--max_steps", "100000"]
    nodes.start(deepspeed_commands(tmp_path / "hosts", flags), [environment(), environment()])
    deadline = time.monotonic() + 240
    while "step 2/" not in nodes.output(0):
        assert time.monotonic() < deadline, nodes.output(0) + nodes.output(1)
        time.sleep(0.1)
    os.killpg(nodes.processes[1].pid, signal.SIGKILL)
    lost = time.monotonic()
    assert nodes.processes[0].wait(60) == 1
    assert time.monotonic() - lost < 30
    assert "rank 1 ended: killed, or its machine was lost" in nodes.output(0)


@pytest.mark.slow
def test_a_build_is_waited_for_on_another_node(nodes, qwen3, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": f"{at}+1"}, {"role": "assistant", "content": str(at + 1)}]}
        for at in range(60)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    arguments = [
        "--data_files", str(path), "--model_name_or_path", str(qwen3), "--output_dir", str(run), "--max_length", "128",
        "--preprocessing_num_workers", "1", *(str(flag) for flag in FLAGS),
    ]  # fmt: skip
    shared = {"MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "dft_train", *arguments]
    tasks = [task(number, tasks=2, per_node="1(x2)", nodes="127.0.0.1,127.0.0.2") for number in range(2)]
    nodes.start([command, command], [environment(**one, **shared) for one in tasks])
    assert nodes.wait() == [0, 0], nodes.output(0) + nodes.output(1)
    assert (run / "dataset" / "manifest.json").is_file()
    assert not list(run.glob(".dft-build-*"))
