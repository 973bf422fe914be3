"""Every code that a finding may have: what it means and what to do. The one source of docs/codes.md.

Used by `validate` (severities) and by the test that holds docs/codes.md to it.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Code(msgspec.Struct, frozen=True):
    severity: Literal["error", "warning", "info"]
    """An error leaves the record out."""
    meaning: str
    remedy: str


CODES: dict[str, Code] = {
    # The bytes
    "invalid_utf8": Code(
        "error", "The record holds bytes that are not UTF-8.", "Convert the file, or repair the line."
    ),
    "invalid_json": Code("error", "The record is not JSON by RFC 8259.", "Repair it at the column named."),
    "nan": Code("error", "NaN or Infinity, which JSON does not have.", "Write null or a number."),
    "cut_line": Code("error", "The file ends inside the record.", "Fetch or write the file again."),
    "too_deep": Code("error", "The record is nested too deep to be read.", "Leave it out."),
    "lone_surrogate": Code("error", "A text holds half a surrogate pair, which is no character.", "Repair the escape."),
    "truncated_compression": Code("error", "A .gz or .zst stream is cut or damaged.", "Fetch or write the file again."),
    "unreadable_file": Code("error", "The file as a whole is no chat data.", "Convert it, or take it out."),
    # The shape
    "not_an_object": Code("error", "The record is not a JSON object.", "Write one object a record."),
    "unknown_shape": Code("error", "No known field holds a conversation.", "Rename the fields to `messages`."),
    "ambiguous_shape": Code("error", "Two fields hold a conversation, or a system turn.", "Keep one of them."),
    "empty_conversation": Code("error", "The conversation has no messages.", "Leave it out."),
    "content_type": Code(
        "error", "A field has another type than text, or than a list where one belongs.", "Write it as text."
    ),
    "unsupported_part": Code(
        "error", "A part of a message is no text, reasoning or tool call.", "Leave the record out."
    ),
    # The conversation
    "no_assistant": Code("error", "No assistant turn: there is nothing to train.", "Leave it out."),
    "unknown_role": Code("error", "A message has a role that is not known.", "Rename the role."),
    "null_content": Code("error", "A message has no content and calls no tool.", "Give it text."),
    "bad_weight": Code("error", "A message's weight is no number from 0 to 1.", "0 is context only, 1 trains."),
    "bad_tool_calls": Code(
        "error", "A tool call has no function's name, or is not JSON.", "Write it in OpenAI's form."
    ),
    "bad_tools": Code("error", "The tools are no list of objects.", "Write each tool as its JSON schema."),
    # With a tokenizer
    "template_refused": Code(
        "error", "The chat template raised an error for it.", "Repair it, or use another template."
    ),
    "mask_unsure": Code("error", "What the template prints does not tell where the reply is.", "Use another template."),
    "nothing_to_train": Code("error", "No assistant turn has a weight above 0.", "Give one a weight, or leave it out."),
    "tool_calls_not_printed": Code(
        "error",
        "The template does not print tool calls (--unsupported_tools quarantine).",
        "Use --unsupported_tools text.",
    ),
    "control_token_in_text": Code(
        "error",
        "A text holds a control token's text (--special_tokens_in_text quarantine).",
        "Remove it, or use encode.",
    ),
    "overlong": Code("warning", "Longer than --max_length.", "Raise --max_length, or choose with --overlong."),
    # What does not leave a record out
    "no_reply_at_end": Code("warning", "The last turn is not the assistant's: it is context only.", "Add the reply."),
    "empty_reply": Code(
        "warning", "An assistant turn is empty: only its end is trained.", "Give it text, or weight 0."
    ),
    "unused_field": Code("info", "A field is not used.", "Nothing, if it is not meant to be."),
}


def codes_markdown() -> str:
    """The text of docs/codes.md."""
    lines = [
        "# Codes of findings",
        "",
        "What `dft-prep validate` reports and `quarantine.jsonl` holds. An error leaves the record out of the dataset;",
        "a warning does not. Codes do not change from version to version.",
        "",
        "| code | severity | meaning | what to do |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {code.severity} | {code.meaning} | {code.remedy} |" for name, code in CODES.items()]
    lines += ["", "`over_max_conversations` in a manifest counts what a source's own limit left out; it is no finding."]
    return "\n".join(lines) + "\n"
