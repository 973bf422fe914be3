"""The import rules: data flows one way, and preparation never needs the trainer's packages."""

from __future__ import annotations

import ast
import graphlib
import re
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


def rooms_of(package: str) -> dict[str, set[str]]:
    """Each sub-package -> the others that it imports, wherever in a module. A module at the top is a room too."""
    home = REPO / PACKAGES[package] / package
    edges: dict[str, set[str]] = {}
    for path in home.rglob("*.py"):
        room = path.relative_to(home).with_suffix("").parts[0]
        found = edges.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
                inner = node.module.split(".")[1:]
                found |= {inner[0]} if inner else {alias.name for alias in node.names}
        found.discard(room)
    return edges


def rooms_on_the_map(package: str) -> dict[str, set[str]]:
    """Each sub-package of the tables of docs/design.md, in their order -> the modules named there."""
    rows = re.findall(r"^\| `(\w+)/` \|([^|]*)\|", (REPO / "docs" / "design.md").read_text("utf-8"), re.MULTILINE)
    home = REPO / PACKAGES[package] / package
    return {room: set(re.findall(r"`(\w+)/?`", names)) for room, names in rows if (home / room).is_dir()}


def test_every_module_is_on_the_map_in_its_room():
    found = {
        package: {
            room.name: {path.stem for path in room.iterdir() if path.stem not in ("__init__", "__pycache__")}
            for room in (REPO / PACKAGES[package] / package).iterdir()
            if (room / "__init__.py").exists()
        }
        for package in ("dft_prep", "dft_train")
    }
    assert {package: rooms_on_the_map(package) for package in found} == found


@pytest.mark.parametrize("package", ["dft_prep", "dft_train"])
def test_a_room_imports_only_those_above_it_on_the_map(package):
    edges = rooms_of(package)
    order = list(rooms_on_the_map(package))
    assert len(order) > 8
    wrong = {room: below for at, room in enumerate(order) if (below := edges[room] & set(order[at + 1 :]))}
    assert not wrong


@pytest.mark.parametrize("package", ["dft_prep", "dft_train"])
def test_rooms_and_the_modules_beside_them_form_no_circle(package):
    order = list(graphlib.TopologicalSorter(rooms_of(package)).static_order())
    assert order[-1] == "__main__"
