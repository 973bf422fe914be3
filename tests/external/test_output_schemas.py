"""SARIF and JUnit outputs against their schemas, which SARIF_SCHEMA (2.1.0, JSON) and JUNIT_XSD (junit-10.xsd) name.

They need the packages jsonschema and xmlschema, which nothing else here does.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.test_findings import FINDINGS, written

SARIF, JUNIT = os.environ.get("SARIF_SCHEMA"), os.environ.get("JUNIT_XSD")


@pytest.mark.skipif(SARIF is None, reason="SARIF_SCHEMA names no schema")
@settings(max_examples=200, deadline=None)
@given(st.lists(FINDINGS, max_size=5))
def test_sarif_is_valid_whatever_the_data_holds(findings):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(Path(SARIF or "").read_text("utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema, format_checker=jsonschema.FormatChecker())
    assert [error.message for error in validator.iter_errors(json.loads(written("sarif", findings)))] == []


@pytest.mark.skipif(JUNIT is None, reason="JUNIT_XSD names no schema")
@settings(max_examples=200, deadline=None)
@given(st.lists(FINDINGS, max_size=5))
def test_junit_is_valid_whatever_the_data_holds(findings):
    xmlschema = pytest.importorskip("xmlschema")
    schema = xmlschema.XMLSchema(JUNIT)
    text = written("junit", findings, files=("good.jsonl",))
    assert list(schema.iter_errors(io.BytesIO(text.encode()))) == []
