from __future__ import annotations

import ast
import re
from pathlib import Path

from dft_prep.codes import CODES, codes_markdown

REPO = Path(__file__).resolve().parents[2]
# The modules that raise codes as (code, path, message ...), and in which call.
RAISED = ("RecordError", "_Illegal", "RenderRefusal")


def raised_codes() -> dict[str, str]:
    """Every code that the package raises by name -> the module that does."""
    found = {}
    for module in sorted((REPO / "prep" / "dft_prep").glob("*.py")):
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found[first.value] = module.name
    return found


def test_the_documentation_is_the_table():
    assert (REPO / "docs" / "codes.md").read_text("utf-8") == codes_markdown()


def test_every_code_that_is_raised_is_in_the_table():
    raised = raised_codes()
    assert {"unknown_role", "invalid_json", "no_assistant"} <= set(raised)
    assert {code: module for code, module in raised.items() if code not in CODES} == {}


def test_every_code_says_what_it_means_and_what_to_do():
    for name, code in CODES.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]+", name)
        assert code.severity in ("error", "warning", "info")
        assert code.meaning.endswith(".") and code.remedy.endswith(".")
