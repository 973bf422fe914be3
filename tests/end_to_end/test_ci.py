"""The pre-commit hook and the GitHub Action as those programs run them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny

REPO = Path(__file__).resolve().parents[2]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
GOOD = json.dumps({"messages": tiny.turns("q", "a")}) + "\n"
BAD = json.dumps({"messages": tiny.turns("nobody answers")}) + "\n"
ODD_NAMES = ("-x y.jsonl", "a=b.jsonl", "$(touch executed).jsonl", "new\nline.jsonl", "'quo\"te'.jsonl")


def git(directory: Path, *words: str) -> subprocess.CompletedProcess:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    environment = {**os.environ, "PATH": PATH, "GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(
        ["git", *identity, *words], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def repository(tmp_path) -> Path:
    """A scratch repository whose commits run the hook's command on the files of the commit, as pre-commit would."""
    (hook,) = yaml.safe_load((REPO / ".pre-commit-hooks.yaml").read_text())
    command = shlex.join([*shlex.split(hook["entry"]), *hook["args"]])
    directory = tmp_path / "repository"
    directory.mkdir()
    assert git(directory, "init", "-q").returncode == 0
    script = directory / ".git" / "hooks" / "pre-commit"
    script.write_text(f"#!/bin/sh\ngit diff --cached --name-only -z --diff-filter=d | xargs -0 {command}\n")
    script.chmod(0o755)
    return directory


def test_a_commit_with_a_bad_record_is_refused_and_says_where(repository):
    (repository / "good.jsonl").write_text(GOOD)
    (repository / "bad.jsonl").write_text(GOOD.replace("q", "r") + BAD)
    git(repository, "add", ".")
    done = git(repository, "commit", "-m", "data")
    assert done.returncode != 0
    assert "bad.jsonl:2:1: no_assistant" in done.stdout + done.stderr
    git(repository, "rm", "-q", "-f", "bad.jsonl")
    assert git(repository, "commit", "-m", "data").returncode == 0


def test_file_names_are_files_whatever_they_look_like(repository):
    for number, name in enumerate(ODD_NAMES):
        (repository / name).write_text(GOOD.replace("q", f"q{number}"))
    git(repository, "add", ".")
    done = git(repository, "commit", "-m", "data")
    assert done.returncode == 0, done.stderr
    assert f"{len(ODD_NAMES)} records, {len(ODD_NAMES)} good" in done.stderr
    assert not (repository / "executed").exists()


@pytest.mark.skipif(shutil.which("pre-commit") is None, reason="pre-commit is not installed")
def test_pre_commit_itself_runs_the_hook(tmp_path):
    (hook,) = yaml.safe_load((REPO / ".pre-commit-hooks.yaml").read_text())
    local = {"repo": "local", "hooks": [{**hook, "language": "system"}]}  # `python` would install us from the index
    (tmp_path / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [local]}))
    for name, content in (("a.jsonl", GOOD), ("-b.jsonl", GOOD + BAD), ("note.txt", "no data")):
        (tmp_path / name).write_text(content)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    words = ["pre-commit", "run", "--all-files", "--color=never"]
    environment = {**os.environ, "PATH": PATH, "PRE_COMMIT_HOME": str(tmp_path / "home")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "-b.jsonl:2:1: no_assistant" in done.stdout
    assert "3 records, 2 good" in done.stdout


@pytest.fixture
def action(tmp_path):
    """Run the action's own script, its inputs given as GitHub gives them."""
    steps = yaml.safe_load((REPO / "action.yml").read_text())["runs"]["steps"]
    validate = steps[-1]
    inputs = yaml.safe_load((REPO / "action.yml").read_text())["inputs"]
    for step in steps:
        assert "${{" not in step["run"], "an input in a script would be run"

    def run(**given: str) -> subprocess.CompletedProcess:
        values = {name: given.get(name.replace("-", "_"), about.get("default", "")) for name, about in inputs.items()}
        environment = {**os.environ, "PATH": PATH}
        for variable, expression in validate["env"].items():
            environment[variable] = values[expression.removeprefix("${{ inputs.").removesuffix(" }}")]
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", validate["run"]],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_the_action_annotates_bad_records_and_fails(action, tmp_path):
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "bad one.jsonl").write_text(BAD)
    done = action(data_files="good.jsonl\nbad one.jsonl\n")
    assert done.returncode == 1
    assert done.stdout.startswith("::error file=bad one.jsonl,line=1,col=1,title=no_assistant::")
    assert action(data_files="good.jsonl").returncode == 0


def test_the_action_passes_its_inputs_on_and_runs_none_of_them(action, tmp_path):
    (tmp_path / "warn.jsonl").write_text(json.dumps({"messages": tiny.turns("q", "a", "and?")}) + "\n")
    (tmp_path / "$(touch executed).jsonl").write_text(GOOD)
    assert action(data_files="warn.jsonl", strict="true").returncode == 1
    files = "warn.jsonl\n$(touch executed).jsonl"
    done = action(data_files=files, strict="true", arguments="--ignore=no_reply_at_end\n", sarif_file="found.sarif")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.sarif").read_text())["version"] == "2.1.0"
    assert action(data_files="`touch executed`; touch executed").returncode == 2
    assert not (tmp_path / "executed").exists()
