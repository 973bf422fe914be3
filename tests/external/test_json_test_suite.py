"""nst/JSONTestSuite (MIT), its test_parsing files: JSON_TEST_SUITE names the folder that holds them.

Each file's bytes become the value of a field that is not used, in a record between good ones. `y_` files are accepted,
`n_` files are rejected at their own line, their neighbours are untouched, and nothing crashes on `i_` files.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dft_common.records import Finding
from dft_prep.judge.judgement import Judge, Judged
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import plan_units

FOLDER = Path(os.environ.get("JSON_TEST_SUITE", "nowhere"))
CASES = sorted(FOLDER.glob("[iny]_*.json"))
pytestmark = pytest.mark.skipif(not CASES, reason="JSON_TEST_SUITE names no folder with the suite's files")

HEAD = b'{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a"}]'
GOOD = [HEAD % number + b"}" for number in range(4)]


def judged(path: Path) -> list[Judged | Finding]:
    (source,) = resolve_sources([str(path)])
    return [
        each for unit in plan_units(source.files[0], source.name) for each in map(Judge(path.name), UnitReader(unit))
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
@pytest.mark.parametrize("form", ["lines", "array", "array on a line"])
def test_a_file_of_the_suite_between_good_records(tmp_path, case, form):
    value = case.read_bytes()
    if form == "lines" and b"\n" in value:
        pytest.skip("a line cannot hold its newline")
    records = [*GOOD[:2], HEAD % 9 + b', "meta": ' + value + b"}", *GOOD[2:]]
    if form == "lines":
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\n".join(records) + b"\n")
    else:
        path = tmp_path / "a.json"
        path.write_bytes(
            b"[\n" + b",\n".join(records) + b"\n]\n" if form == "array" else b"[" + b", ".join(records) + b"]"
        )
    found = judged(path)
    neighbours = [each.conversation.messages[0].content for each in found if isinstance(each, Judged)]
    if case.name.startswith("i_"):
        assert set(neighbours) - {"q9"} == {"q0", "q1", "q2", "q3"}
        return
    if case.name.startswith("y_"):
        assert neighbours == ["q0", "q1", "q9", "q2", "q3"]
        return
    bad = [each for each in found if isinstance(each, Finding)]
    first = {"lines": 3, "array": 4, "array on a line": 1}[form]
    assert bad
    assert neighbours == ["q0", "q1", "q2", "q3"]
    assert all(first <= finding.line <= first + value.count(b"\n") for finding in bad)
