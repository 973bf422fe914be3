"""Findings as text, JSON, JSON lines, or annotations of a GitHub workflow; `sarif` and `junit` have files of their own.

`make_writer` is called by `validate_command`. Data is untrusted: what it holds never reaches a terminal raw, and never
breaks a format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

import msgspec

from dft_common.errors import log_safe, log_safe_json, printable
from dft_common.records import Finding
from dft_prep.summary import Summary

_BREAKING = re.compile("[\n\t\u2028\u2029]")


class FindingWriter(Protocol):
    """Writes findings, in order, and what they came to."""

    def add(self, finding: Finding, fingerprint: str) -> None: ...

    def close(self, summary: Summary) -> None: ...


def make_writer(format: str, out: TextIO, failing: Sequence[str]) -> FindingWriter:
    """format: `text`, `json`, `jsonl`, `github`, `sarif` or `junit`. failing: severities that fail the validation."""
    if format == "sarif":
        from dft_prep.sarif import SarifWriter

        return SarifWriter(out)
    if format == "junit":
        from dft_prep.junit import JunitWriter

        return JunitWriter(out, failing)
    return {"text": TextWriter, "json": JsonWriter, "jsonl": JsonLinesWriter, "github": GithubWriter}[format](out)


def one_line(text: str) -> str:
    """`text` without what would end a line, steer a terminal or command a CI runner that reads the log."""
    return log_safe(_BREAKING.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


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


def json_text(value: Any) -> str:
    """JSON in which nothing steers a terminal, and half surrogate pairs, which UTF-8 cannot hold, are their escapes."""
    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        text = msgspec.json.encode(_whole(msgspec.to_builtins(value))).decode()
    return log_safe_json(text)


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list | tuple) else value


class JsonWriter:
    """`{"findings": [...], "summary": {...}}`, with the findings' fingerprints, in order, in the summary."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._fingerprints: list[str] = []
        out.write('{"findings": [')

    def add(self, finding: Finding, fingerprint: str) -> None:
        self._out.write(("," if self._fingerprints else "") + "\n  " + json_text(finding))
        self._fingerprints.append(fingerprint)

    def close(self, summary: Summary) -> None:
        summary.fingerprints = self._fingerprints
        self._out.write(f'\n], "summary": {json_text(summary)}}}\n')


class JsonLinesWriter:
    """A finding a line, each with its fingerprint besides."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def add(self, finding: Finding, fingerprint: str) -> None:
        self._out.write(json_text({**msgspec.structs.asdict(finding), "fingerprint": fingerprint}) + "\n")
        self._out.flush()

    def close(self, summary: Summary) -> None:
        """The summary goes to stderr."""
