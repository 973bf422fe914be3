"""The pre-commit hook and the GitHub Action as those programs run them: with real commits, and with hostile inputs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from dft_prep.sources.named import resolve_sources

REPO = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
PATH = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
GOOD = json.dumps({"messages": tiny.turns("q", "a")}) + "\n"
BAD = json.dumps({"messages": tiny.turns("nobody answers")}) + "\n"
WARNED = json.dumps({"messages": tiny.turns("q", "a", "and?")}) + "\n"
ODD_NAMES = (
    "-x y.jsonl", "--strict.jsonl", "--output=executed", "a=b.jsonl", "[ab]*.jsonl", "$(touch executed).jsonl",
    "`touch executed`.jsonl", "new\nline.jsonl", "'quo\"te'.jsonl", "::error::x.jsonl",
)  # fmt: skip
SUFFIXES = (
    ".jsonl", ".json", ".ndjson", ".parquet", ".jsonl.gz", ".json.zst", ".parquet.xz",
    ".txt", ".jsonl.bak", ".json5", ".gz", "jsonl", ".jsonl.bz2",
)  # fmt: skip


@pytest.fixture(scope="module")
def hook() -> dict[str, Any]:
    (hook,) = yaml.safe_load((REPO / ".pre-commit-hooks.yaml").read_text())
    return hook


def git(directory: Path, *words: str) -> subprocess.CompletedProcess:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    environment = {**os.environ, "PATH": PATH, "GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(
        ["git", *identity, *words], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def repository(tmp_path, hook) -> Path:
    """A scratch repository whose commits run the hook's command on the files of the commit, as pre-commit would."""
    command = shlex.join([*shlex.split(hook["entry"]), *hook["args"]])
    changed = "git diff --cached --name-only -z --diff-filter=d"
    directory = tmp_path / "repository"
    directory.mkdir()
    assert git(directory, "init", "-q").returncode == 0
    script = directory / ".git" / "hooks" / "pre-commit"
    script.write_text(f"#!/bin/sh\n{changed} | grep -zE {shlex.quote(hook['files'])} | xargs -0 -r {command}\n")
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
    names = [name if name.endswith(".jsonl") else f"{name}.jsonl" for name in ODD_NAMES]
    for number, name in enumerate(names):
        (repository / name).write_text(GOOD.replace("q", f"q{number}"))
    git(repository, "add", ".")
    done = git(repository, "commit", "-m", "data")
    assert done.returncode == 0, done.stderr
    assert f"{len(names)} records, {len(names)} good" in done.stderr
    assert not list(repository.glob("executed*"))


def test_a_commit_without_data_passes(repository):
    (repository / "notes.txt").write_text("no data")
    git(repository, "add", ".")
    done = git(repository, "commit", "-m", "notes")
    assert done.returncode == 0, done.stderr


def test_the_hook_takes_the_files_that_a_directory_would_give(hook, tmp_path):
    names = [f"{number}{suffix}" for number, suffix in enumerate(SUFFIXES)]
    for name in names:
        (tmp_path / name).touch()
    (source,) = resolve_sources([str(tmp_path)])
    expected = {file.relative for file in source.files}
    assert {name for name in names if re.search(hook["files"], name)} == expected
    assert 0 < len(expected) < len(names)


@pytest.mark.skipif(shutil.which("pre-commit") is None, reason="pre-commit is not installed")
def test_pre_commit_itself_runs_the_hook(tmp_path, hook):
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


class Action:
    """The action's own script, run as a runner runs it: inputs in variables, the program where a step put it."""

    def __init__(self, workspace: Path, temporary: Path) -> None:
        described = yaml.safe_load((REPO / "action.yml").read_text())
        self.steps: list[dict[str, Any]] = described["runs"]["steps"]
        self.inputs: dict[str, dict[str, Any]] = described["inputs"]
        self._workspace, self._temporary = workspace, temporary
        self.program = temporary / "dft-prep" / "bin" / "dft-prep"
        self.program.parent.mkdir(parents=True)
        self.program.symlink_to(PROGRAMS / "dft-prep")

    def run(self, **given: str) -> subprocess.CompletedProcess:
        """given: inputs by name, `_` for `-`."""
        values = {name: about.get("default", "") for name, about in self.inputs.items()}
        values |= {name.replace("_", "-"): value for name, value in given.items()}
        assert len(values) == len(self.inputs), "an input that the action does not have"
        validate = self.steps[-1]
        environment = {**os.environ, "RUNNER_TEMP": str(self._temporary)}
        for variable, expression in validate["env"].items():
            environment[variable] = values[expression.removeprefix("${{ inputs.").removesuffix(" }}")]
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", validate["run"]],
            cwd=self._workspace, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture
def action(tmp_path) -> Action:
    workspace = tmp_path / "work space"
    workspace.mkdir()
    return Action(workspace, tmp_path / "temporary files")


def test_no_script_of_the_action_holds_an_expression(action):
    for step in action.steps:
        assert "${{" not in step["run"], "GitHub would put an input's text into the script"


def test_the_action_annotates_bad_records_and_fails(action, tmp_path):
    (tmp_path / "work space" / "good.jsonl").write_text(GOOD)
    (tmp_path / "work space" / "bad one.jsonl").write_text(BAD)
    done = action.run(data_files="good.jsonl\nbad one.jsonl\n")
    assert done.returncode == 1
    assert done.stdout.startswith("::error file=bad one.jsonl,line=1,col=1,title=no_assistant::")
    assert action.run(data_files="good.jsonl", strict="").returncode == 0


def test_the_action_passes_every_input_on(action, tmp_path):
    (tmp_path / "work space" / "warned.jsonl").write_text(WARNED)
    strict = {"data_files": "warned.jsonl", "strict": "true"}
    assert action.run(**strict, sarif_file="found here.sarif").returncode == 1
    assert action.run(**strict, baseline="found here.sarif").returncode == 0
    assert action.run(**strict, arguments="--ignore\nno_reply_at_end").returncode == 0
    done = action.run(**strict, tokenizer="nowhere here")
    assert done.returncode == 2
    assert "nowhere here" in done.stderr


@pytest.mark.parametrize("name", ["data_files", "tokenizer", "strict", "baseline", "sarif_file", "arguments"])
def test_an_input_of_the_action_is_a_word_whatever_it_holds(action, tmp_path, name):
    program = action.program
    program.unlink()
    program.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
    program.chmod(0o755)
    hostile = "\"; touch executed; $(touch executed) `touch executed` ' \\ * | touch executed &"
    done = action.run(**{"data_files": "a.jsonl", name: hostile})
    assert done.returncode == 0, done.stderr
    assert hostile in [word.partition("=")[2] or word for word in done.stdout.split("\0")]
    assert not list((tmp_path / "work space").iterdir())


def test_names_of_files_reach_the_action_as_they_are(action, tmp_path):
    names = [name for name in ODD_NAMES if "\n" not in name]  # a line is a name
    for number, name in enumerate(names):
        (tmp_path / "work space" / name).write_text(GOOD.replace("q", f"q{number}"))
    done = action.run(data_files="\n".join(names))
    assert done.returncode == 0, done.stderr
    assert f"{len(names)} records, {len(names)} good" in done.stderr
    assert not (tmp_path / "work space" / "executed").exists()
