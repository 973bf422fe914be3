"""`dft-prep explain CODE`: what a finding means and how to repair it; and docs/codes.md, from the same texts.

Called by `cli` and by the test that holds docs/codes.md to it.
"""

from __future__ import annotations

import difflib

from dft_common.errors import SetupError, printable
from dft_prep.codes.examples import EXAMPLES
from dft_prep.codes.table import CODES, Code, Scope

_SCOPES: dict[Scope, str] = {
    "file": "A file as a whole, from which no record can be read",
    "note": "Something odd that leaves no record out",
    "record": "A record that is not JSON, or holds no conversation",
    "rule": "A conversation that can be read",
    "template": "What a chat template makes of a conversation (with --tokenizer)",
}


def explain(name: str | None) -> str:
    """The text for one code, or the list of all. Raises SetupError for one that is not there."""
    if name is None:
        return _list()
    if name not in CODES:
        close = difflib.get_close_matches(name, CODES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`dft-prep explain` lists every code"
        raise SetupError(f"{name}: there is no such code", remedy=hint)
    code, example = CODES[name], EXAMPLES[name]
    lines = [f"{name} ({code.severity})", f"  {code.meaning}", f"  What to do: {code.remedy}", f"  {settable(code)}"]
    lines += ["", "  Example:", f"    {example.bad}"]
    lines += ["", "  Repaired:", f"    {example.repaired}"] if example.repaired else []
    return printable("\n".join(lines))


def settable(code: Code) -> str:
    """Which severities a recipe may give it."""
    if code.may_be("error") and code.may_be("ignore"):
        return "Its severity may be set: --error, --warn or --ignore."
    if code.may_be("ignore"):
        return "It cannot be made an error; --warn or --ignore may be set."
    return "It stays an error: nothing could be built from what it is about."


def _list() -> str:
    lines = ["`dft-prep explain CODE` says more of each."]
    for scope, title in _SCOPES.items():
        found = [(name, code) for name, code in CODES.items() if code.scope == scope]
        lines += ["", f"{title}:", *(f"  {name:<26} {code.severity:<8} {code.meaning}" for name, code in found)]
    return "\n".join(lines)


def codes_markdown() -> str:
    """The text of docs/codes.md."""
    lines = [
        "# Codes of findings",
        "",
        "What `dft-prep validate` reports and `quarantine.jsonl` holds; `dft-prep explain CODE` prints the same.",
        "An error leaves the record out of the dataset; warnings and infos do not; of duplicates one is kept.",
        "Codes do not change from version to version.",
    ]
    for scope, title in _SCOPES.items():
        lines += ["", f"## {title}", "", "| code | severity | meaning | what to do |", "|---|---|---|---|"]
        found = {name: code for name, code in CODES.items() if code.scope == scope}
        lines += [
            f"| [`{name}`](#{name}) | {code.severity} | {code.meaning} | {code.remedy} |"
            for name, code in found.items()
        ]
        for name, code in found.items():
            lines += ["", f"### {name}", "", f"{code.meaning} {code.remedy} {settable(code)}", *_example_lines(name)]
    lines += ["", "`over_max_conversations` in a manifest counts what a source's own limit left out; it is no finding."]
    return "\n".join(lines) + "\n"


def _example_lines(name: str) -> list[str]:
    example = EXAMPLES[name]
    if not example.bad.startswith(("{", "[")):
        return ["", f"Example: {example.bad}."]
    repaired = ["", "Repaired:", "", *_block(example.repaired)] if example.repaired else []
    return ["", *_block(example.bad), *repaired]


def _block(text: str) -> list[str]:
    return ["```", printable(text), "```"]
