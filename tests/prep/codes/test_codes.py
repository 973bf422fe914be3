from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from dft_common.errors import SetupError
from dft_common.records import Finding
from dft_prep.codes.examples import EXAMPLES
from dft_prep.codes.explain import codes_markdown, explain
from dft_prep.codes.table import CODES
from dft_prep.judge.judgement import Judge
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import plan_units

REPO = Path(__file__).resolve().parents[3]
# Calls that raise or make a finding with a code, and the code's place among their arguments.
RAISED = {"RecordError": 0, "Illegal": 0, "RenderRefusal": 0, "FileError": 0, "Oddity": 0, "record_finding": 2}
# These are of records, but their example is no line that could stand here.
NOT_A_LINE = {
    "invalid_utf8",
    "too_deep",
    "record_too_large",
    "truncated_compression",
    "missing_field",
    "contaminated",
}


def raised_codes() -> dict[str, str]:
    """Every code that the package raises by name -> the module that does."""
    found = {}
    for module in sorted((REPO / "prep" / "dft_prep").rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED:
                at = RAISED[node.func.id]
                code = node.args[at] if len(node.args) > at else None
                if isinstance(code, ast.Constant) and isinstance(code.value, str):
                    found[code.value] = module.name
    return found


def codes_of(path: Path, line: str, end: bytes = b"\n") -> list[str]:
    """The codes of everything found in a line between others; the last one where it has another end."""
    good = EXAMPLES["no_assistant"].repaired.encode()
    path.write_bytes(good + b"\n" + line.encode() + end)
    (source,) = resolve_sources([str(path)])
    found: list[str] = []
    for unit in plan_units(source.files[0], source.name):
        for judged in map(Judge("a.jsonl"), UnitReader(unit)):
            found += [judged.code] if isinstance(judged, Finding) else [note.code for note in judged.notes]
    return found


def test_the_documentation_is_the_table():
    assert (REPO / "docs" / "codes.md").read_text("utf-8") == codes_markdown()


def test_every_code_that_is_raised_is_in_the_table():
    raised = raised_codes()
    assert {"unknown_role", "no_assistant", "mask_unsure"} <= set(raised)
    assert {code: module for code, module in raised.items() if code not in CODES} == {}


def test_every_code_says_what_it_means_and_what_to_do():
    assert list(EXAMPLES) == list(CODES)
    for name, code in CODES.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]+", name)
        assert code.meaning.endswith(".") and code.remedy.endswith(".")
        assert EXAMPLES[name].bad


LINES = [name for name, code in CODES.items() if code.scope in ("record", "rule") and name not in NOT_A_LINE]


@pytest.mark.parametrize("name", LINES)
def test_the_example_of_a_code_has_it_and_the_repaired_one_has_not(tmp_path, name):
    end = b"" if name == "cut_line" else b"\n"
    assert name in codes_of(tmp_path / "a.jsonl", EXAMPLES[name].bad, end)
    assert codes_of(tmp_path / "a.jsonl", EXAMPLES[name].repaired) == []


def test_explain_says_all_of_a_code_and_names_the_nearest():
    said = explain("users_in_a_row")
    for part in (CODES["users_in_a_row"].meaning, CODES["users_in_a_row"].remedy, EXAMPLES["users_in_a_row"].repaired):
        assert part in said
    assert "--ignore" in said
    assert all(name in explain(None) for name in CODES)
    with pytest.raises(SetupError, match="no such code") as refusal:
        explain("user_in_a_row")
    assert "users_in_a_row" in refusal.value.remedy
    assert "\x00" not in explain("nul_bytes")


def test_explain_of_duplicates_says_what_a_build_does_with_them():
    assert "a build keeps one" in explain("duplicate")
    assert "never leaves a record out" not in explain("duplicate")
