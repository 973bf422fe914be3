"""Findings as text, JSON, JSON lines, or annotations of a GitHub workflow; `sarif` and `junit` have files of their own.

`make_writer` is called by `validate.command`. Data is untrusted: what it holds never reaches a terminal raw, and never
breaks a format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TextIO

import msgspec

from dft_common.errors import printable
from dft_common.records import Finding
from dft_prep.validate.safe_text import json_text, one_line
from dft_prep.validate.summary import Summary


class FindingWriter(Protocol):
    """Writes findings, in order, and what they came to."""

    def add(self, finding: Finding, fingerprint: str) -> None: ...

    def close(self, summary: Summary) -> None: ...


def make_writer(format: str, out: TextIO, failing: Sequence[str]) -> FindingWriter:
    """format: `text`, `json`, `jsonl`, `github`, `sarif` or `junit`. failing: severities that fail the validation."""
    if format == "sarif":
        from dft_prep.validate.sarif import SarifWriter

        return SarifWriter(out)
    if format == "junit":
        from dft_prep.validate.junit import JunitWriter

        return JunitWriter(out, failing)
    return {"text": TextWriter, "json": JsonWriter, "jsonl": JsonLinesWriter, "github": GithubWriter}[format](out)


class TextWriter:
    """`file:line:column: CODE path: message`, and what to do on a line of its own."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def add(self, finding: Finding, fingerprint: str) -> None:
        mark = "" if finding.severity == "error" else f"{finding.severity}: "
        place = f"{finding.file}:{finding.line}:{finding.column}"
        self._out.write(one_line(f"{place}: {mark}{finding.code} {finding.path}: {finding.message}") + "\n")
        if finding.help:
            self._out.write(f"    {one_line(finding.help)}\n")
        self._out.flush()

    def close(self, summary: Summary) -> None:
        """The summary goes to stderr."""


class GithubWriter:
    """`::error file=...,line=...,col=...,title=CODE::message`, a line each."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def add(self, finding: Finding, fingerprint: str) -> None:
        level = {"error": "error", "warning": "warning", "info": "notice"}[finding.severity]
        file, title = _github_property(finding.file), _github_property(finding.code)
        message = _github_text(f"{finding.path}: {finding.message}. {finding.help}".rstrip())
        self._out.write(f"::{level} file={file},line={finding.line},col={finding.column},title={title}::{message}\n")
        self._out.flush()

    def close(self, summary: Summary) -> None:
        """The summary goes to stderr."""


def _github_text(text: str) -> str:
    return printable(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _github_property(text: str) -> str:
    return _github_text(text).replace(":", "%3A").replace(",", "%2C")


class JsonWriter:
    """`{"findings": [...], "summary": {...}}`, with the findings' fingerprints, in order, in the summary."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._fingerprints: list[str] = []
        self._before = '{"findings": ['

    def add(self, finding: Finding, fingerprint: str) -> None:
        self._out.write(f"{self._before}\n  {json_text(finding)}")
        self._before = ","
        self._fingerprints.append(fingerprint)

    def close(self, summary: Summary) -> None:
        summary.fingerprints = self._fingerprints
        opening = "" if self._fingerprints else self._before
        self._out.write(f'{opening}\n], "summary": {json_text(summary)}}}\n')


class JsonLinesWriter:
    """A finding a line, each with its fingerprint besides."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def add(self, finding: Finding, fingerprint: str) -> None:
        self._out.write(json_text({**msgspec.structs.asdict(finding), "fingerprint": fingerprint}) + "\n")
        self._out.flush()

    def close(self, summary: Summary) -> None:
        """The summary goes to stderr."""
