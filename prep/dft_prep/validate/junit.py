"""Findings as JUnit XML, which Jenkins, GitLab and others show: a suite a file, a failing case a finding.

Called by `findings.make_writer`. What does not fail the validation is a passing case that says so in its output;
a file without a finding is one passing case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TextIO
from xml.sax.saxutils import escape, quoteattr

from dft_common.records import Finding
from dft_prep.validate.safe_text import one_line
from dft_prep.validate.summary import Summary

# What XML 1.0 cannot hold, escaped or not (its production 2, Char); the controls are escaped before.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class JunitWriter:
    """Findings are held until the end: at most as many as are shown."""

    def __init__(self, out: TextIO, failing: Sequence[str]) -> None:
        """failing: severities whose findings are failures."""
        self._out, self._failing = out, failing
        self._by_file: dict[str, list[Finding]] = {}

    def add(self, finding: Finding, fingerprint: str) -> None:
        self._by_file.setdefault(finding.file, []).append(finding)

    def close(self, summary: Summary) -> None:
        files = list(dict.fromkeys([*summary.files, *self._by_file]))
        suites = [self._suite(file, self._by_file.get(file, [])) for file in files]
        tests = sum(max(1, len(self._by_file.get(file, []))) for file in files)
        failures = sum(self._fails(finding) for found in self._by_file.values() for finding in found)
        head = f'<testsuites name="dft-prep validate" tests="{tests}" failures="{failures}" errors="0">'
        self._out.write("\n".join(['<?xml version="1.0" encoding="UTF-8"?>', head, *suites, "</testsuites>"]) + "\n")

    def _fails(self, finding: Finding) -> bool:
        return finding.severity in self._failing

    def _suite(self, file: str, findings: list[Finding]) -> str:
        failures = sum(map(self._fails, findings))
        cases = [_case(finding, self._fails(finding)) for finding in findings]
        if not cases:
            cases = [f'    <testcase classname={_attribute(file)} name="valid" time="0"/>']
        counts = f'tests="{len(cases)}" failures="{failures}" errors="0" skipped="0" time="0"'
        return "\n".join([f"  <testsuite name={_attribute(file)} {counts}>", *cases, "  </testsuite>"])


def _text(text: str) -> str:
    return _NO_XML.sub(lambda found: found[0].encode("unicode_escape").decode(), one_line(text))


def _attribute(text: str) -> str:
    return quoteattr(_text(text))


def _case(finding: Finding, fails: bool) -> str:
    place = f"{finding.file}:{finding.line}:{finding.column}"
    # Readers hold cases of one name for one case: two findings of a code at a place differ in their paths.
    name = _attribute(f"{finding.code} {finding.path}, line {finding.line}, column {finding.column}")
    message = f"{finding.code} {finding.path}: {finding.message}"
    body = escape(_text(f"{place}: {message}")) + ("\n" + escape(_text(finding.help)) if finding.help else "")
    inside = (
        f"<failure message={_attribute(message)} type={_attribute(finding.code)}>{body}</failure>"
        if fails
        else f"<system-out>{finding.severity}: {body}</system-out>"
    )
    return f'    <testcase classname={_attribute(finding.file)} name={name} time="0">{inside}</testcase>'
