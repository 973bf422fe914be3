"""Findings as SARIF 2.1.0 (OASIS), which code scanning services and editors read.

Called by `findings.make_writer`.
"""

from __future__ import annotations

import re
from typing import Any, TextIO
from urllib.parse import quote

from dft_common import __version__
from dft_common.records import Finding
from dft_prep.codes.examples import EXAMPLES
from dft_prep.codes.table import CODES
from dft_prep.validate.safe_text import json_text, one_line
from dft_prep.validate.summary import Summary

FINGERPRINT_NAME = "dftPrepRecord/v1"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[A-Za-z0-9.-]+:[0-9]+(?=/))?")
"""Of a URL, with its host where that has a port."""

_STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


class SarifWriter:
    """One run. Findings are held until the end: at most as many as are shown."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._results: list[dict[str, Any]] = []
        self._rules: dict[str, int] = {}

    def add(self, finding: Finding, fingerprint: str) -> None:
        rule = self._rules.setdefault(finding.code, len(self._rules))
        text = f"{finding.path}: {finding.message}" + (f". {finding.help}" if finding.help else "")
        region: dict[str, Any] = {"startLine": finding.line, "startColumn": finding.column}
        if finding.byte_offset >= 0:
            region["byteOffset"] = finding.byte_offset
        self._results.append(
            {
                "ruleId": finding.code,
                "ruleIndex": rule,
                "level": _LEVELS[finding.severity],
                "message": {"text": message_text(text)},
                "locations": [
                    {"physicalLocation": {"artifactLocation": {"uri": file_uri(finding.file)}, "region": region}}
                ],
                "partialFingerprints": {FINGERPRINT_NAME: fingerprint},
            }
        )

    def close(self, summary: Summary) -> None:
        driver = {"name": "dft-prep", "version": __version__, "rules": [_rule(code) for code in self._rules]}
        run = {
            "tool": {"driver": driver},
            "columnKind": "unicodeCodePoints",
            "results": self._results,
            "invocations": [{"executionSuccessful": True}],
        }
        log = {
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [run],
        }
        self._out.write(json_text(log) + "\n")


def _rule(name: str) -> dict[str, Any]:
    code, example = CODES[name], EXAMPLES[name]
    help = f"{code.meaning} {code.remedy}\nExample: {example.bad}"
    help += f"\nRepaired: {example.repaired}" if example.repaired else ""
    return {
        "id": name,
        "shortDescription": {"text": code.meaning},
        "help": {"text": help},
        "defaultConfiguration": {"level": _LEVELS[code.severity]},
    }


def message_text(text: str) -> str:
    """A plain text message that shows `text`: no placeholder (3.11.5: braces are doubled), no link (3.11.6)."""
    # The standard has no escape for a text that looks like a link; without its parenthesis it is none.
    return one_line(text).replace("{", "{{").replace("}", "}}").replace("](", "]\\x28")


def file_uri(path: str) -> str:
    """A path or URL as a URI reference: relative where the path is, percent-encoded."""
    if scheme := _SCHEME.match(path):
        return scheme[0] + _STRAY_PERCENT.sub("%25", quote(path[scheme.end() :], safe="/%?=&+,;~"))
    encoded = quote(path, safe="/~")
    # A colon in the first segment of a relative reference would read as a scheme (RFC 3986, 4.2).
    return f"file://{encoded}" if path.startswith("/") else encoded
