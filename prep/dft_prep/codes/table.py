"""Every code that a finding may have: how grave it is, what it means, what to do. `examples` has one of each.

Used by `judge` and `severities`, by `report` (what a build's notes mean), and by `explain`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["error", "warning", "info"]
Scope = Literal["file", "note", "record", "rule", "template"]
"""What a code is about.

file: a file as a whole, which no record can be read from. note: something odd that is no reason to leave a record out.
record: a record that is not JSON, or no conversation. rule: a conversation, whose severity a recipe may set.
template: what a chat template or tokenizer makes of a conversation; only its warnings and infos may be set.
"""


class Code(msgspec.Struct, frozen=True, kw_only=True):
    severity: Severity
    """An error leaves the record out."""
    scope: Scope
    meaning: str
    remedy: str

    def may_be(self, severity: Severity | Literal["ignore"]) -> bool:
        """Whether a recipe may set this severity. What cannot be read or rendered stays an error."""
        if severity == self.severity or self.scope == "rule":
            return True
        if self.severity == "error":
            return False
        return severity != "error" or self.scope == "template"


def _file(meaning: str, remedy: str) -> Code:
    return Code(severity="error", scope="file", meaning=meaning, remedy=remedy)


def _note(severity: Severity, meaning: str, remedy: str) -> Code:
    return Code(severity=severity, scope="note", meaning=meaning, remedy=remedy)


def _record(meaning: str, remedy: str) -> Code:
    return Code(severity="error", scope="record", meaning=meaning, remedy=remedy)


def _rule(severity: Severity, meaning: str, remedy: str) -> Code:
    return Code(severity=severity, scope="rule", meaning=meaning, remedy=remedy)


def _template(severity: Severity, meaning: str, remedy: str) -> Code:
    return Code(severity=severity, scope="template", meaning=meaning, remedy=remedy)


CODES: dict[str, Code] = {
    # A file as a whole
    "unreadable_file": _file("The file cannot be opened or read.", "Check the path, its permissions and its links."),
    "other_kind": _file("The file is no chat data: a picture, an archive, a database.", "Take it out, or convert it."),
    "utf16": _file("The file is UTF-16 or UTF-32, not UTF-8.", "Convert it: iconv -f UTF-16 -t UTF-8 FILE."),
    "array_in_jsonl": _file(
        "A .jsonl file holds one JSON array in place of a record a line.",
        "Rename it to .json, or write it as lines: jq -c '.[]' FILE.",
    ),
    "corrupt_parquet": _file("The file is no whole Parquet file.", "Fetch or write the file again."),
    "decompression_bomb": _file(
        "A compressed file grows beyond all measure when it is unpacked.", "Unpack it, look at it, and give the text."
    ),
    "file_changed": _file("The file changed while it was read.", "Run again when nothing writes to it."),
    # A file that is read, with something odd in it
    "empty_file": _note("warning", "The file holds no records.", "Take it out, or fetch it again."),
    "bom": _note("info", "The file begins with a byte order mark; it is passed over.", "Write UTF-8 without a BOM."),
    "crlf": _note("info", "Lines end with CR LF.", "Nothing: JSON takes CR for white space."),
    "blank_lines": _note("info", "Blank lines; they are no records.", "Nothing, if no record is missing."),
    "lines_in_json": _note(
        "info", "A .json file holds a record a line; it is read as JSONL.", "Nothing, or rename it to .jsonl."
    ),
    "objects_over_lines": _note(
        "info", "Objects follow one another over several lines; they are read as records.", "Write one record a line."
    ),
    "mixed_shapes": _note(
        "info", "The file holds records of several shapes; each is read as its own.", "Nothing, if that is meant."
    ),
    "unused_field": _note("info", "A field is not used.", "Nothing, if it is not meant to be."),
    # The bytes of a record
    "invalid_utf8": _record("The record holds bytes that are not UTF-8.", "Convert the file, or repair the line."),
    "nul_bytes": _record(
        "The record holds NUL bytes: a write that was cut off, or another encoding.", "Fetch or write the file again."
    ),
    "invalid_json": _record("The record is not JSON by RFC 8259.", "Repair it at the column named."),
    "trailing_comma": _record("A comma stands before a closing bracket.", "Remove the comma."),
    "json_comment": _record("A comment, which JSON does not have.", "Remove the comment."),
    "nan": _record("NaN or Infinity, which JSON does not have.", "Write null or a number."),
    "two_records_on_a_line": _record("More than one record stands on the line.", "Write one record a line."),
    "record_over_lines": _record(
        "A record of a .jsonl file is spread over several lines.", "Write one record a line: jq -c . FILE."
    ),
    "cut_line": _record("The file ends inside the record.", "Fetch or write the file again."),
    "too_deep": _record("The record is nested too deep to be read.", "Leave it out."),
    "record_too_large": _record("The record is larger than any conversation.", "Check where its line should end."),
    "duplicate_key_in_message": _record(
        "A key stands twice where a conversation is read from: which one counts is not said.", "Keep one of them."
    ),
    "lone_surrogate": _record("A text holds half a surrogate pair, which is no character.", "Repair the escape."),
    "truncated_compression": _record("A compressed stream is cut or damaged.", "Fetch or write the file again."),
    # The shape of a record
    "not_an_object": _record("The record is not a JSON object.", "Write one object a record."),
    "unknown_shape": _record("No known field holds a conversation.", "Rename the fields, or map them in the recipe."),
    "ambiguous_shape": _record("Two fields hold a conversation, or a system turn.", "Keep one, or give the format."),
    "missing_field": _record(
        "A field that the recipe names is not there.", "Correct the recipe's path, or the record."
    ),
    "empty_conversation": _record("The conversation has no messages.", "Leave it out."),
    "content_type": _record(
        "A field has another type than text, or than a list where one belongs.", "Write it as text."
    ),
    "unsupported_part": _record("A part of a message is of a type that is not known.", "Write it as text."),
    "media_part": _record("A picture, sound, video or file, which is not trainable here.", "Leave the record out."),
    "no_assistant": _record("No assistant turn: there is nothing to train.", "Leave it out."),
    "unknown_role": _record("A message has a role that is not known.", "Rename the role, or map it in the recipe."),
    "null_content": _record("A message has no content and calls no tool.", "Give it text."),
    "bad_weight": _record("A message's weight is no number from 0 to 1.", "0 is context only, 1 trains."),
    "bad_tool_calls": _record("A tool call has no function's name, or is not JSON.", "Write it in OpenAI's form."),
    "bad_tools": _record("The tools are no list of objects.", "Write each tool as its JSON schema."),
    # The conversation
    "duplicate_keys": _rule("warning", "A key stands twice in an object; the last one counts.", "Keep one of them."),
    "number_out_of_range": _rule("info", "A number is beyond the range of a float.", "Write it as text."),
    "no_reply_at_end": _rule("warning", "The last turn is not the assistant's: it is context only.", "Add the reply."),
    "empty_reply": _rule(
        "warning", "An assistant turn is empty, or white space: only its end is trained.", "Give it text."
    ),
    "system_not_first": _rule("warning", "A system turn stands inside the conversation.", "Move it to the front."),
    "users_in_a_row": _rule("warning", "Two user turns follow one another.", "Join them, or add the reply."),
    "assistants_in_a_row": _rule("warning", "Two assistant turns follow one another.", "Join them."),
    "call_without_answer": _rule("warning", "A tool is called, and no result follows.", "Add the tool's turn."),
    "answer_without_call": _rule("warning", "A tool's result follows no call.", "Add the call, or leave it out."),
    "call_id_mismatch": _rule("warning", "A tool's result names another call than was made.", "Repair the id."),
    "arguments_not_json": _rule("warning", "A call's arguments are not a JSON object.", "Write them as one."),
    "arguments_misfit": _rule("warning", "A call's arguments do not fit the declared tool.", "Repair call or tool."),
    "undeclared_tool": _rule("warning", "A tool is called that the record does not declare.", "Declare the tool."),
    "control_characters": _rule(
        "warning", "A text holds control characters or noncharacters.", "Remove them, if they are not meant."
    ),
    "reply_equals_question": _rule("warning", "A reply is the same as what it answers.", "Write the reply."),
    "unwanted_reply": _rule(
        "error",
        "Its label says that the reply is not wanted (KTO's `label` or `kto_tag`: false).",
        "Leave it out; or --ignore unwanted_reply, if the label means something else.",
    ),
    "repeated_reply": _rule("warning", "A reply is repeated within the conversation.", "Remove the repetition."),
    "contaminated": _rule(
        "error",
        "It shares 13 words in a row, or a text of 8 to 12, with a file of --decontaminate.",
        "Nothing: it is left out.",
    ),
    "duplicate": _note("warning", "The same conversation stands before; a build keeps one.", "Remove it."),
    # With a tokenizer
    "template_refused": _template(
        "error", "The chat template raised an error for it.", "Repair it, or use another template."
    ),
    "mask_unsure": _template(
        "error", "What the template prints does not tell where the reply is.", "Use another template."
    ),
    "nothing_to_train": _record(
        "No assistant turn that would be trained has a weight above 0.", "Give one a weight, or leave it out."
    ),
    "tool_calls_not_printed": _template(
        "error",
        "The template does not print tool calls (--unsupported_tools quarantine).",
        "Use --unsupported_tools text.",
    ),
    "control_token_in_text": _template(
        "warning",
        "A text holds a control token's text: it is encoded as plain text, or left out as "
        "--special_tokens_in_text says.",
        "Nothing, or --special_tokens_in_text quarantine.",
    ),
    "overlong": _template("warning", "Longer than --max_length.", "Raise --max_length, or choose with --overlong."),
    "tool_calls_as_text": _template(
        "info", "The template does not print tool calls: they became their turn's text.", "Use a template with tools."
    ),
    "tools_not_printed": _template(
        "info", "The template does not print the list of tools: the model never sees it.", "Use a template with tools."
    ),
    "tool_not_printed": _template(
        "info", "The template does not print a tool's result: the model never sees it.", "Use a template with tools."
    ),
    "system_not_printed": _template(
        "info", "The template does not print a system turn as given.", "Use a template that does."
    ),
    "developer_not_printed": _template(
        "info", "The template does not print a developer turn as given.", "Use a template that does."
    ),
    "user_not_printed": _template(
        "info", "The template does not print a user turn as given.", "Use a template that does."
    ),
    "reasoning_not_printed": _template(
        "info", "The template does not print reasoning: it is not trained.", "Use a template that does."
    ),
    "name_not_printed": _template(
        "info", "The template does not print a name: the model never sees it.", "Use a template that does."
    ),
    "reply_rewritten": _template(
        "info",
        "The template does not print a reply as given, white space at its edges aside.",
        "Use a template that does.",
    ),
    "reply_without_end": _template(
        "info", "A reply ends in no end-of-turn token: it does not teach to stop.", "Use a template that prints one."
    ),
    "history_rewritten": _template(
        "info",
        "An earlier reply is printed otherwise than it was as the last (reasoning removed, say): trained as it stands.",
        "Use --train_on last or --unroll_turns True to train replies as they were generated.",
    ),
}
