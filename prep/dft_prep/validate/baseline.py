"""Findings that are known already: a validation lets them through, and fails on new ones alone.

Called by `validate.command` (the file of --baseline) and `survey` (the fingerprint of each finding).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from dft_common.errors import SetupError
from dft_common.logs import get_logger
from dft_common.records import Finding
from dft_prep.validate.sarif import FINGERPRINT_NAME

_REMEDY = "make it with `dft-prep validate ... --format json --max_errors 1000000 --output FILE`"


def finding_fingerprint(finding: Finding, raw: bytes) -> str:
    """16 hex digits of file, code, path and the record's bytes: the same wherever in its file the record stands."""
    about = "\0".join((finding.file, finding.code, finding.path))
    return xxhash.xxh3_64_hexdigest(about.encode("utf-8", "surrogatepass") + b"\0" + raw)


def read_baseline(path: str) -> frozenset[str]:
    """The fingerprints in an earlier output of `--format json`, `jsonl` or `sarif`. Raises SetupError for others."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SetupError(f"--baseline {path}: {error.strerror}", remedy=_REMEDY) from None
    if not data.strip():
        return frozenset()  # the JSON lines of no finding
    try:
        return frozenset(msgspec.convert(list(_fingerprints(path, data)), list[str]))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, AttributeError, KeyError, TypeError, ValueError):
        raise SetupError(f"--baseline {path}: holds no findings with fingerprints", remedy=_REMEDY) from None


def _fingerprints(path: str, data: bytes) -> Iterator[Any]:
    first, _, rest = data.strip().partition(b"\n")
    try:
        lines = [msgspec.json.decode(first)]
    except msgspec.DecodeError:
        lines = []
    if lines and "fingerprint" in lines[0]:
        yield from (line["fingerprint"] for line in [*lines, *msgspec.json.Decoder().decode_lines(rest)])
        return
    document = msgspec.json.decode(data)
    if "runs" in document:
        results: Iterable[Any] = (result for run in document["runs"] for result in run.get("results", ()))
        yield from (result["partialFingerprints"][FINGERPRINT_NAME] for result in results)
    else:
        yield from document["summary"]["fingerprints"]
        if hidden := document["summary"].get("hidden"):
            message = "--baseline %s: %s findings are not in it, for it was made with a smaller --max_errors: %s"
            get_logger().warning(message, path, f"{int(hidden):,}", _REMEDY)
