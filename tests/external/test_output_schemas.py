"""SARIF and JUnit outputs against their schemas, which SARIF_SCHEMA (2.1.0, JSON) and JUNIT_XSD (junit-10.xsd) name.

They need the packages jsonschema (with its `format` extra, for URIs) and xmlschema, which nothing else here does.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dft_prep.validate.command import ValidateOptions, run_validate
from prep.validate.test_findings import FINDINGS, written

SARIF, JUNIT = os.environ.get("SARIF_SCHEMA"), os.environ.get("JUNIT_XSD")
SOURCES = Path(__file__).resolve().parents[3] / "shared" / "sources"

GOOD = "".join(json.dumps(record) + "\n" for record in tiny.numbered(3)).encode()
HOSTILE_NAME = "-a b#c?d%41:]]><&\"'\x1b[2J\n::error::x.jsonl"
HOSTILE = rb"""
{"messages": [{"role": "]]></failure><x a='&lt;\u0000\ud800\u001b[2J\uffff{0}[x](http://h)", "content": "q"}]}
{"messages": [{"role": "user", "content": "\u202e%0A::error::x"}], "]]>&\u0007": 1, "\ud800": 2}
{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "<!--\u2028"}]}]}
{"messages": [
"""
FILES = {
    "good": {"good.jsonl": GOOD, "empty.jsonl": b""},
    "bad": {"bad.jsonl": GOOD + b'{"messages": []}\n[1,]\n\xff\n' + GOOD, "png.json": b"\x89PNG"},
    "hostile": {HOSTILE_NAME: HOSTILE + b"\x00\x1b\xff\n", "\udcff.jsonl": HOSTILE},
}  # fmt: skip


@pytest.fixture(scope="module")
def sarif_errors():
    """What the schema says against a SARIF text."""
    if SARIF is None:
        pytest.skip("SARIF_SCHEMA names no schema")
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("rfc3986_validator")
    schema = json.loads(Path(SARIF).read_text("utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema, format_checker=jsonschema.FormatChecker())
    return lambda text: [error.message for error in validator.iter_errors(json.loads(text))]


@pytest.fixture(scope="module")
def junit_errors():
    """What the schema says against a JUnit text."""
    if JUNIT is None:
        pytest.skip("JUNIT_XSD names no schema")
    schema = pytest.importorskip("xmlschema").XMLSchema(JUNIT)
    return lambda text: list(schema.iter_errors(io.BytesIO(text.encode())))


@settings(max_examples=200)
@given(st.lists(FINDINGS, max_size=5))
def test_sarif_is_valid_whatever_a_finding_holds(sarif_errors, findings):
    assert sarif_errors(written("sarif", findings)) == []


@settings(max_examples=200)
@given(st.lists(FINDINGS, max_size=5))
def test_junit_is_valid_whatever_a_finding_holds(junit_errors, findings):
    assert junit_errors(written("junit", findings, files=("good.jsonl",))) == []


def output(format: str, *files: str) -> str:
    found = Path("found")
    run_validate(ValidateOptions(data_files=files, format=format, output=str(found), preprocessing_num_workers=1))
    return found.read_text("utf-8")


@pytest.mark.parametrize("format", ["sarif", "junit"])
@pytest.mark.parametrize("kind", FILES)
def test_a_validation_is_written_by_the_schema(request, tmp_path, monkeypatch, format, kind):
    errors = request.getfixturevalue(f"{format}_errors")
    monkeypatch.chdir(tmp_path)
    for name, content in FILES[kind].items():
        Path(name).write_bytes(content)
    text = output(format, *FILES[kind])
    assert errors(text) == []
    if kind != "good":
        assert "invalid_utf8" in text, "the validation has come to the last line"


@pytest.mark.skipif(not SOURCES.is_dir(), reason="there are no shared sources")
@pytest.mark.parametrize("format", ["sarif", "junit"])
def test_a_validation_of_real_files_is_written_by_the_schema(request, tmp_path, monkeypatch, format):
    errors = request.getfixturevalue(f"{format}_errors")
    monkeypatch.chdir(tmp_path)
    assert errors(output(format, str(SOURCES))) == []


def test_the_schemas_are_those_of_what_is_written(sarif_errors, junit_errors):
    assert sarif_errors('{"version": "2.1.0", "runs": [{"results": []}]}')
    bad_uri = json.loads(written("sarif", []))
    bad_uri["runs"][0]["results"] = [
        {"message": {"text": "x"}, "locations": [{"physicalLocation": {"artifactLocation": {"uri": "a b"}}}]}
    ]
    assert sarif_errors(json.dumps(bad_uri))
    assert junit_errors("<testsuites><testcase/></testsuites>")
