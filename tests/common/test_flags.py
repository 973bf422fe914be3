"""The command line as both commands spell it."""

from __future__ import annotations

import pytest

from dft_common.errors import DataError, SetupError
from dft_common.flags import Flag, FlagCommand, expand_argv, run_command, to_arguments

FLAGS = (
    Flag(name="data_files", kind="list", default=()),
    Flag(name="bf16", kind="bool", default=False),
    Flag(name="max_length", aliases=("cutoff_len",), kind="int", default=8192, minimum=2),
    Flag(name="name"),
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--data_files", "a", "b", "c*"], ["--data_files=a", "--data_files=b", "--data_files=c*"]),
        (["--data-files=a", "--data_files", "b"], ["--data_files=a", "--data_files=b"]),
        (["--data_files", "a", "--bf16", "OUT"], ["--data_files=a", "--bf16=True", "OUT"]),
        (["--data_files", "a", "--", "OUT"], ["--data_files=a", "--", "OUT"]),
        (["--bf16", "False", "OUT"], ["--bf16=False", "OUT"]),
        (["--bf16"], ["--bf16=True"]),
        (["--name", "--odd"], ["--name=--odd"]),
        (["--cutoff-len", "5"], ["--cutoff_len=5"]),
        (["--unknown-flag", "x"], ["--unknown_flag", "x"]),
    ],
)
def test_expansion(given, expected):
    assert expand_argv(given, FLAGS) == expected


@pytest.mark.parametrize("given", [["--data_files"], ["--data_files", "--bf16"], ["--name"]])
def test_a_flag_without_its_value_is_a_setup_error(given):
    with pytest.raises(SetupError):
        expand_argv(given, FLAGS)


def command(seen: dict, flags=FLAGS) -> FlagCommand:
    return FlagCommand("c", lambda **values: seen.update(values), flags)


def test_config_gives_defaults_and_flags_win(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("data-files: [x, {name: n, path: y}]\nmax_length: 64\nbf16: true\nlearning_rate: 1e-5\n")
    seen: dict = {}
    assert run_command(command(seen), "c", ["--config", str(config), "--max_length", "32"]) == 0
    assert seen == {"data_files": ("x", {"name": "n", "path": "y"}), "max_length": 32, "bf16": True, "name": None}


def test_a_key_that_is_nearly_a_flag_is_an_error(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("max_lenght: 64\n")
    assert run_command(command({}), "c", ["--config", str(config)]) == 2
    assert "did you mean 'max_length'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max_lenght", "5"], "--max_length"),
        (["--max_length", "one"], "max_length"),
        (["--max_length", "1"], "max_length"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
    ],
)
def test_bad_usage_exits_2_and_names_the_flag(given, message, capsys):
    assert run_command(command({}), "c", given) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_required_flag_is_asked_for(capsys):
    command = FlagCommand("x", lambda **_: 0, [Flag(name="dataset_dir", required=True)])
    assert run_command(command, "x", []) == 2
    assert "Missing option '--dataset_dir'" in capsys.readouterr().err
    assert run_command(command, "x", ["--dataset_dir", "OUT"]) == 0


def test_bad_data_exits_1_with_the_remedy(capsys):
    def fail(**_):
        raise DataError("a.jsonl:3: found \x1b[31mred", remedy="repair it")

    assert run_command(FlagCommand("c", fail, ()), "c", []) == 1
    assert capsys.readouterr().err == "error: a.jsonl:3: found \\x1b[31mred\n  what to do: repair it\n"


def test_an_interrupt_exits_130():
    def stop(**_):
        raise KeyboardInterrupt

    assert run_command(FlagCommand("c", stop, ()), "c", []) == 130


def test_arguments_give_the_values_again():
    values = {"data_files": ["a b", "c"], "bf16": True, "max_length": 5, "name": None}
    seen: dict = {}
    assert run_command(command(seen), "c", to_arguments(values)) == 0
    assert seen == {"data_files": ("a b", "c"), "bf16": True, "max_length": 5, "name": None}
