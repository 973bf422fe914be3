"""The errors that end a command, each with the exit code that it ends with.

    DftError
    ├── DataError    exit 1: the data, or a dataset on disk, is bad
    └── SetupError   exit 2: the command line or the environment is wrong

Anything else that escapes is a bug of ours and keeps its traceback. `report_error` prints what a
user reads: what was found, what was expected, and what to do.
"""

from __future__ import annotations

import re
import sys

EXIT_BAD_DATA = 1
EXIT_BAD_USAGE = 2
EXIT_INTERRUPTED = 130

# C0 and C1 controls but newline and tab, and the Unicode bidi overrides: untrusted text may carry terminal escapes. And
# half surrogate pairs, which no output can take.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# What a CI runner obeys in a log: `::command::` where a line begins (GitHub), `##[command]` and `##vso[command]`
# anywhere in it (GitHub, Azure).
_COMMAND_LINE = re.compile(r"^(\s*):(?=:)", re.MULTILINE)
_COMMAND_MARK = re.compile(r"#(?=#(?:vso)?\[)")

# What JSON leaves as it is: DEL, C1 controls, the Unicode line ends and bidi overrides.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class DftError(Exception):
    """An error that the user can act on. `remedy` says how; it is printed on a line of its own."""

    exit_code = EXIT_BAD_DATA

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple:
        # Worker processes send their errors home by pickle, which would lose the keyword.
        return _rebuild, (type(self), self.message, self.remedy)


class DataError(DftError):
    """The input data or a dataset on disk is bad."""


class SetupError(DftError):
    """The command line or the environment is wrong."""

    exit_code = EXIT_BAD_USAGE


def _rebuild(kind: type[DftError], message: str, remedy: str) -> DftError:
    return kind(message, remedy=remedy)


def printable(text: str) -> str:
    """`text` with terminal control characters shown as `\\x1b` and the like, for messages that quote data."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_json(text: str) -> str:
    """JSON text with what a terminal may obey as its JSON escapes (`\\u009b`). ASCII's controls are escapes already."""
    return text if text.isascii() and "\x7f" not in text else _UNSAFE_IN_JSON.sub(_json_escape, text)


def _json_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def log_safe(text: str) -> str:
    """`printable`, and with what a CI runner would take for a command of its own as `\\x3a:` and `\\x23#[`."""
    return printable(_COMMAND_LINE.sub(r"\1\\x3a", _COMMAND_MARK.sub(r"\\x23", text)))


def log_safe_json(text: str) -> str:
    """`printable_json`, and the same for its texts: no line of JSON begins with a colon."""
    return _COMMAND_MARK.sub(r"\\u0023", printable_json(text))


def report_error(error: DftError) -> int:
    """Print `error` to stderr and return the exit code for it."""
    sys.stderr.write(f"error: {log_safe(error.message)}\n")
    if error.remedy:
        sys.stderr.write(f"  what to do: {log_safe(error.remedy)}\n")
    return error.exit_code
