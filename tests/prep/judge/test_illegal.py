"""What is no JSON: each common mistake by its own code, at its own place, and what only looks like one is not."""

from __future__ import annotations

import json

import pytest

from dft_common.records import Finding
from dft_prep.judge.illegal import Illegal, by_the_standard
from dft_prep.judge.judgement import Judge
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import UnitReader
from dft_prep.sources.units import plan_units


def refused(data: bytes, *, cut: bool = False, is_line: bool = True) -> tuple[str, int]:
    """(code, characters before the place)"""
    with pytest.raises(Illegal) as raised:
        by_the_standard(data, cut=cut, is_line=is_line)
    assert raised.value.message
    assert raised.value.help
    return raised.value.code, raised.value.position


# A line -> its code, and what stands at the place that is named.
MISTAKES = {
    "two records": (b'{"a": 1}{"b": 2}', "two_records_on_a_line", b'{"b"'),
    "two records and a space": (b'{"a": 1} {"b": 2}', "two_records_on_a_line", b'{"b"'),
    "two lists": (b"[1][2]", "two_records_on_a_line", b"[2]"),
    "more than a record": (b'{"a": 1} x', "invalid_json", b"x"),
    "a bracket too many": (b'{"a": 1}}', "invalid_json", b"}"),
    "the first line of an indented record": (b"{", "record_over_lines", b""),
    "the first line of a record cut at its comma": (b'{"a": 1,', "record_over_lines", b""),
    "a field": (b'  "a": 1,', "record_over_lines", b": 1,"),
    "a field whose name has a quote": (b'  "a\\"b": [', "record_over_lines", b": ["),
    "closing brackets": (b"  }],", "record_over_lines", b"}],"),
    "a closing brace": (b"}\r", "record_over_lines", b"}"),
    "a record without its end": (b'{"a": "x"', "invalid_json", b""),
    "an open text": (b'{"a": "x', "invalid_json", b'"x'),
    "text and a colon": (b"a: 1,", "invalid_json", b"a"),
    "a comma in an object": (b'{"a": 1, }', "trailing_comma", b", }"),
    "a comma in a list": (b'{"a": [1,2\t,\t]}', "trailing_comma", b",\t]"),
    "a comma alone": (b"[,]", "trailing_comma", b",]"),
    "two commas": (b"[1,,2]", "invalid_json", b",2]"),
    "a comma in a text": (b'{"a": ",]" x}', "invalid_json", b"x}"),
    "a comment at the end": (b'{"a": 1} // one', "json_comment", b"// one"),
    "a comment inside": (b'{"a": /* one */ 1}', "json_comment", b"/* one"),
    "a comment behind a comma": (b'{"a": 1, # one', "json_comment", b"# one"),
    "an address in a text": (b'{"a": "http://x", b}', "invalid_json", b"b}"),
    "NaN": (b'{"NaN": "NaN \\" NaN", "a": NaN}', "nan", b"NaN}"),
    "-Infinity": (b'{"a": -Infinity}', "nan", b"-Infinity}"),
    "nan": (b'{"a": nan}', "invalid_json", b"nan}"),
    "NUL at the end": (b'{"a": 1}\0\0', "nul_bytes", b"\0\0"),
    "NUL in a text": (b'{"a": "x\0y"}', "nul_bytes", b"\0y"),
    "single quotes": (b"{'a': 1}", "invalid_json", b"'a'"),
    "a tab in a text": (b'{"a": "\t"}', "invalid_json", b"\t"),
    "Latin-1": ('{"日本": "caf'.encode() + b'\xe9"}', "invalid_utf8", b'\xe9"'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_has_its_code_at_its_place(name):
    data, code, at = MISTAKES[name]
    found, position = refused(data)
    before = data.decode("utf-8", "surrogateescape")[position:].encode("utf-8", "surrogateescape")
    assert (found, before[: len(at)]) == (code, at)
    assert bool(before) == bool(at)


REMEDIES = {
    b"{'a': 1}": "double quotes",
    b'{"a": "\t"}': "\\t",
    b'{"a": "C:\\dir"}': "backslash",
    b'{"a": 1}}': "one record a line",
}


@pytest.mark.parametrize("data", REMEDIES, ids=str)
def test_common_mistakes_have_remedies_of_their_own(data):
    with pytest.raises(Illegal) as raised:
        by_the_standard(data, cut=False, is_line=True)
    assert REMEDIES[data] in raised.value.help


@pytest.mark.parametrize("name", ["a field", "closing brackets", "the first line of an indented record"])
def test_where_records_may_take_several_lines_a_piece_is_no_matter_of_lines(name):
    assert refused(MISTAKES[name][0], is_line=False)[0] == "invalid_json"


ODD = '{"é\\u00e9\\ud83d\\ude00": [true, false, null, -1.5e+3, {"x": "日本😀"}], "b": -0.25}'.encode()


@pytest.mark.parametrize("length", range(1, len(ODD)))
def test_a_record_that_a_file_ends_in_is_cut_wherever_that_is(length):
    """Inside of a character, an escape, a literal or a number too."""
    assert refused(ODD[:length], cut=True)[0] == "cut_line"
    assert refused(ODD[:length] + b"@", cut=True)[0] in ("invalid_json", "cut_line", "invalid_utf8")


@pytest.mark.parametrize("data", [b'{"a": trux', b'{"a": 1} e', b'{"a": "\xe9"', b'{"a": 1,, '])
def test_what_is_wrong_before_the_end_is_not_laid_to_the_cut(data):
    assert refused(data, cut=True)[0] in ("invalid_json", "invalid_utf8")


@pytest.mark.parametrize("levels", [10_000, 1_000_000])
@pytest.mark.parametrize("shape", ["lists", "objects", "open lists", "a field of a record"])
def test_any_depth_is_a_finding_and_no_crash(tmp_path, levels, shape):
    good = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    deep = {
        "lists": b"[" * levels + b"]" * levels,
        "objects": b'{"a":' * levels + b"1" + b"}" * levels,
        "open lists": b"[" * levels,
        "a field of a record": good[:-1] + b', "x": ' + b"[" * levels + b"]" * levels + b"}",
    }[shape]
    (found,) = findings(tmp_path / "a.jsonl", good + b"\n" + deep + b"\n" + good + b"\n")
    assert (found.code, found.line) == ("too_deep", 2)


def findings(path, data: bytes) -> list[Finding]:
    path.write_bytes(data)
    (source,) = resolve_sources([str(path)])
    (unit,) = plan_units(source.files[0], source.name)
    return [found for found in map(Judge(path.name), UnitReader(unit)) if isinstance(found, Finding)]


RECORD = {"messages": [{"role": "user", "content": "é日本"}, {"role": "assistant", "content": "X"}]}
TEXT = json.dumps(RECORD, ensure_ascii=False)
INDENTED = json.dumps(RECORD, ensure_ascii=False, indent=2)
FILES = {
    "lines": ("a.jsonl", "{0}\n{1}\n{0}\n"),
    "lines with a BOM": ("a.jsonl", "\ufeff{1}\n{0}\n{0}\n"),
    "an array of a line": ("a.json", "[{0}, {1}, {0}]"),
    "an array with a BOM": ("a.json", "\ufeff[{1}, {0}]"),
    "an array of lines": ("a.json", "[\n  {0},\n  {1},\n  {0}\n]\n"),
    "indented objects": ("a.json", "{2}\n{3}\n{2}"),
    "an indented array": ("a.json", "[{2},\n{3}, {2}\n]"),
    "two to a line": ("a.json", "[{0}, {1},\n {1}, {0}, {0}]"),
}


BAD = ["@", "\ud8ff", "NaN", "tru", "// é\n"]
# No line holds a newline.
PLACES = [(name, bad) for name in FILES for bad in BAD if not (FILES[name][0] == "a.jsonl" and "\n" in bad)]


@pytest.mark.parametrize(("name", "bad"), PLACES, ids=ascii)
def test_a_finding_is_at_the_line_and_column_of_its_file(tmp_path, name, bad):
    """`bad` in the place of a reply: what is found is found there."""
    file, form = FILES[name]
    whole = form.format(TEXT, TEXT.replace('"X"', bad), INDENTED, INDENTED.replace('"X"', bad))
    expected, at = [], -1
    while (at := whole.find(bad, at + 1)) >= 0:
        line = whole.count("\n", 0, at) + 1
        column = at - (whole.rfind("\n", 0, at) + 1) + 1 - whole.startswith("\ufeff", 0, 1) * (line == 1)
        expected.append((line, column))
    found = findings(tmp_path / file, whole.encode("utf-8", "surrogatepass"))
    assert [(finding.line, finding.column) for finding in found] == expected
