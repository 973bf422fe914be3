"""Text from data as the writers of findings may print it: it ends no line, steers no terminal, breaks no JSON.

Used by `writers`, `sarif` and `junit`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from dft_common.errors import log_safe, log_safe_json

_BREAKING = re.compile("[\n\t\u2028\u2029]")


def one_line(text: str) -> str:
    """`text` without what would end a line, steer a terminal or command a CI runner that reads the log."""
    return log_safe(_BREAKING.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


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
