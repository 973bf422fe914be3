"""The import rules: data flows one way, and preparation never needs the trainer's packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGES = {"dft_common": "common", "dft_prep": "prep", "dft_train": "train"}
FORBIDDEN = {
    "dft_common": {"dft_prep", "dft_train", "torch", "transformers", "datasets", "deepspeed"},
    "dft_prep": {"dft_train", "torch", "datasets", "deepspeed"},
    "dft_train": {"dft_prep"},
}
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "accelerate",
    "pyarrow",
    "numpy",
    "tokenizers",
    "rich.progress",
)


def imports(path: Path) -> set[str]:
    """Top-level names of everything that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_what_it_must_not(package):
    modules = sorted((REPO / PACKAGES[package] / package).rglob("*.py"))
    assert len(modules) > 5
    broken = {path.name: bad for path in modules if (bad := imports(path) & FORBIDDEN[package])}
    assert not broken


def test_only_the_conversion_of_a_sentencepiece_model_may_use_transformers():
    users = {path.name for path in (REPO / "prep" / "dft_prep").rglob("*.py") if "transformers" in imports(path)}
    assert users == {"tokenizer_files.py"}


@pytest.mark.parametrize(("module", "heavy"), [("dft_prep", HEAVY), ("dft_train", HEAVY[:5])])
def test_help_imports_nothing_heavy(module, heavy):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{module}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('heavy:', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Usage" in out
    assert out.splitlines()[-1] == "heavy: []"


def test_every_module_says_what_it_is_for():
    missing = [
        str(path)
        for package, folder in PACKAGES.items()
        for path in (REPO / folder / package).rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert not missing
