"""An example of every code of `codes.CODES`, and the same repaired: what `dft-prep explain` and docs/codes.md show.

Used by `explain` and `sarif`, and by the test that judges each example: a record must have its code, and what is
repaired must not.
"""

from __future__ import annotations

from typing import NamedTuple


class Example(NamedTuple):
    bad: str
    """One record as it stands in a file, or words where it is no record that has the code."""
    repaired: str = ""
    """The record without it."""


_GOOD = '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]}'
_TOOLS = (
    '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", "content": null, '
    '"tool_calls": [{"type": "function", "function": {"name": "weather", '
    '"arguments": "{\\"city\\": \\"Oslo\\"}"}}]}, {"role": "tool", "content": "rain"}, {"role": "assistant", '
    '"content": "It rains."}]}'
)

EXAMPLES: dict[str, Example] = {
    "unreadable_file": Example(
        "chat.jsonl: Permission denied",
    ),
    "other_kind": Example(
        "a zip archive that is called chat.jsonl",
    ),
    "utf16": Example(
        'a file that a spreadsheet saved as "Unicode text"',
    ),
    "array_in_jsonl": Example(
        "chat.jsonl, whose first line is `[` and whose last is `]`",
    ),
    "corrupt_parquet": Example(
        "a download of chat.parquet that broke off",
    ),
    "decompression_bomb": Example(
        "a .gz of 10 MB that holds 10 GB of zeros",
    ),
    "file_changed": Example(
        "a log that another program is still writing",
    ),
    "empty_file": Example(
        "a file of 0 bytes, or of blank lines alone",
    ),
    "bom": Example(
        "a file that begins with the bytes EF BB BF",
    ),
    "crlf": Example(
        "a file that was written on Windows",
    ),
    "blank_lines": Example(
        "an empty line between two records",
    ),
    "lines_in_json": Example(
        "chat.json, which holds an object a line and no array around them",
    ),
    "objects_over_lines": Example(
        "chat.json, which holds indented objects one after another",
    ),
    "mixed_shapes": Example(
        "a file with records of `messages` and records of `conversations`",
    ),
    "unused_field": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}], "meta": {"source": "a book"}}'
        ),
        _GOOD,
    ),
    "invalid_utf8": Example(
        "a line in Latin-1: the byte E9 for é",
    ),
    "nul_bytes": Example(
        '{"messages": [{"role": "user", "content": "\x00\x00\x00\x00',
        _GOOD,
    ),
    "invalid_json": Example(
        "{'messages': []}",
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
    ),
    "trailing_comma": Example(
        '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}],}',
        _GOOD,
    ),
    "json_comment": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}] /* checked */}'
        ),
        _GOOD,
    ),
    "nan": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}], "score": NaN}'
        ),
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}], "score": null}'
        ),
    ),
    "two_records_on_a_line": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}]} {"messages": [{"role": "user", "content": "What is 1 + 1?"}, '
            '{"role": "assistant", "content": "2"}]}'
        ),
        _GOOD,
    ),
    "record_over_lines": Example(
        '{"messages": [',
        _GOOD,
    ),
    "cut_line": Example(
        '{"messages": [{"role": "user", "content"',
        _GOOD,
    ),
    "too_deep": Example(
        '{"meta": [[[ ... 10,000 levels',
        _GOOD,
    ),
    "record_too_large": Example(
        "a line of more than 256 MiB",
    ),
    "duplicate_key_in_message": Example(
        ('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]}'),
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
    ),
    "lone_surrogate": Example(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\\ud83d"}]}',
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\\ud83d\\ude00"}]}',
    ),
    "truncated_compression": Example(
        "a download of chat.jsonl.gz that broke off",
    ),
    "not_an_object": Example(
        '["What is 1 + 1?", "2"]',
        _GOOD,
    ),
    "unknown_shape": Example(
        '{"utterance": "What is 1 + 1?", "reaction": "2"}',
        '{"question": "What is 1 + 1?", "answer": "2"}',
    ),
    "ambiguous_shape": Example(
        (
            '{"instruction": "What is 1 + 1?", "output": "2", "messages": [{"role": "user", "content": "q"}, '
            '{"role": "assistant", "content": "a"}]}'
        ),
        '{"instruction": "What is 1 + 1?", "output": "2"}',
    ),
    "missing_field": Example(
        "a recipe with `fields: {prompt: $.question}`, and a record without `question`",
    ),
    "empty_conversation": Example(
        '{"messages": []}',
        _GOOD,
    ),
    "content_type": Example(
        '{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "7"}, {"role": "assistant", "content": "a"}]}',
    ),
    "unsupported_part": Example(
        (
            '{"messages": [{"role": "user", "content": [{"type": "hologram", "data": "x"}]}, '
            '{"role": "assistant", "content": "It rains."}]}'
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "assistant", '
            '"content": "It rains."}]}'
        ),
    ),
    "media_part": Example(
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", '
            '"image_url": {"url": "cat.png"}}]}, {"role": "assistant", "content": "It rains."}]}'
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "A cat."}]}, '
            '{"role": "assistant", "content": "It rains."}]}'
        ),
    ),
    "no_assistant": Example(
        '{"messages": [{"role": "user", "content": "What is 1 + 1?"}]}',
        _GOOD,
    ),
    "unknown_role": Example(
        '{"messages": [{"role": "usr", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]}',
        _GOOD,
    ),
    "null_content": Example(
        '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "2"}]}',
        _GOOD,
    ),
    "bad_weight": Example(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 2}]}',
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]}',
    ),
    "bad_tool_calls": Example(
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", '
            '"content": null, "tool_calls": [{"function": {"arguments": "{}"}}]}, {"role": "tool", '
            '"content": "rain"}, {"role": "assistant", "content": "It rains."}]}'
        ),
        _TOOLS,
    ),
    "bad_tools": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}], "tools": 7}'
        ),
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}], "tools": [{"type": "function", "function": {"name": "weather", '
            '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, '
            '"required": ["city"]}}}]}'
        ),
    ),
    "duplicate_keys": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}], "meta": {"id": 1, "id": 2}}'
        ),
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}], "meta": {"id": 1}}'
        ),
    ),
    "number_out_of_range": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}], "score": 1e400}'
        ),
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}], "score": "1e400"}'
        ),
    ),
    "no_reply_at_end": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}, {"role": "user", "content": "And 2 + 2?"}]}'
        ),
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}, {"role": "user", "content": "And 2 + 2?"}, {"role": "assistant", '
            '"content": "4"}]}'
        ),
    ),
    "empty_reply": Example(
        '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": ""}]}',
        _GOOD,
    ),
    "system_not_first": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "2"}, {"role": "system", "content": "Be brief."}, {"role": "user", '
            '"content": "And 2 + 2?"}, {"role": "assistant", "content": "4"}]}'
        ),
        (
            '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", '
            '"content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]}'
        ),
    ),
    "users_in_a_row": Example(
        (
            '{"messages": [{"role": "user", "content": "Hello"}, {"role": "user", '
            '"content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]}'
        ),
        (
            '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}, '
            '{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]}'
        ),
    ),
    "assistants_in_a_row": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "Let me see."}, {"role": "assistant", "content": "2"}]}'
        ),
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "Let me see. 2"}]}'
        ),
    ),
    "call_without_answer": Example(
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", '
            '"content": null, "tool_calls": [{"type": "function", "function": {"name": "weather", '
            '"arguments": "{\\"city\\": \\"Oslo\\"}"}}]}, {"role": "user", "content": "Well?"}, '
            '{"role": "assistant", "content": "It rains."}]}'
        ),
        _TOOLS,
    ),
    "answer_without_call": Example(
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "tool", '
            '"content": "rain"}, {"role": "assistant", "content": "It rains."}]}'
        ),
        _TOOLS,
    ),
    "call_id_mismatch": Example(
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", '
            '"content": null, "tool_calls": [{"id": "call_1", "type": "function", '
            '"function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}}]}, {"role": "tool", '
            '"content": "rain", "tool_call_id": "call_2"}, {"role": "assistant", "content": "It rains."}]}'
        ),
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", '
            '"content": null, "tool_calls": [{"id": "call_1", "type": "function", '
            '"function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}}]}, {"role": "tool", '
            '"content": "rain", "tool_call_id": "call_1"}, {"role": "assistant", "content": "It rains."}]}'
        ),
    ),
    "arguments_not_json": Example(
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", '
            '"content": null, "tool_calls": [{"type": "function", "function": {"name": "weather", '
            '"arguments": "city=Oslo"}}]}, {"role": "tool", "content": "rain"}, {"role": "assistant", '
            '"content": "It rains."}]}'
        ),
        _TOOLS,
    ),
    "arguments_misfit": Example(
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", '
            '"content": null, "tool_calls": [{"type": "function", "function": {"name": "weather", '
            '"arguments": "{\\"town\\": \\"Oslo\\"}"}}]}, {"role": "tool", "content": "rain"}, '
            '{"role": "assistant", "content": "It rains."}], "tools": [{"type": "function", '
            '"function": {"name": "weather", "parameters": {"type": "object", '
            '"properties": {"city": {"type": "string"}}, "required": ["city"]}}}]}'
        ),
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", '
            '"content": null, "tool_calls": [{"type": "function", "function": {"name": "weather", '
            '"arguments": "{\\"city\\": \\"Oslo\\"}"}}]}, {"role": "tool", "content": "rain"}, '
            '{"role": "assistant", "content": "It rains."}], "tools": [{"type": "function", '
            '"function": {"name": "weather", "parameters": {"type": "object", '
            '"properties": {"city": {"type": "string"}}, "required": ["city"]}}}]}'
        ),
    ),
    "undeclared_tool": Example(
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", '
            '"content": null, "tool_calls": [{"type": "function", "function": {"name": "forecast", '
            '"arguments": "{\\"city\\": \\"Oslo\\"}"}}]}, {"role": "tool", "content": "rain"}, '
            '{"role": "assistant", "content": "It rains."}], "tools": [{"type": "function", '
            '"function": {"name": "weather", "parameters": {"type": "object", '
            '"properties": {"city": {"type": "string"}}, "required": ["city"]}}}]}'
        ),
        (
            '{"messages": [{"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", '
            '"content": null, "tool_calls": [{"type": "function", "function": {"name": "weather", '
            '"arguments": "{\\"city\\": \\"Oslo\\"}"}}]}, {"role": "tool", "content": "rain"}, '
            '{"role": "assistant", "content": "It rains."}], "tools": [{"type": "function", '
            '"function": {"name": "weather", "parameters": {"type": "object", '
            '"properties": {"city": {"type": "string"}}, "required": ["city"]}}}]}'
        ),
    ),
    "control_characters": Example(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\\u001b[31mred"}]}',
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "red"}]}',
    ),
    "reply_equals_question": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "What is 1 + 1?"}]}'
        ),
        _GOOD,
    ),
    "unwanted_reply": Example(
        '{"prompt": "What is 1 + 1?", "completion": "3", "label": false}',
        '{"prompt": "What is 1 + 1?", "completion": "2", "label": true}',
    ),
    "repeated_reply": Example(
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "The sum of one and one is two."}, {"role": "user", "content": "And 2 + 2?"}, '
            '{"role": "assistant", "content": "The sum of one and one is two."}]}'
        ),
        (
            '{"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", '
            '"content": "The sum of one and one is two."}, {"role": "user", "content": "And 2 + 2?"}, '
            '{"role": "assistant", "content": "The sum of two and two is four."}]}'
        ),
    ),
    "contaminated": Example(
        "a question of the benchmark that is also in the training data",
    ),
    "duplicate": Example(
        "the same conversation twice, in one file or in two, whatever their formats",
    ),
    "template_refused": Example(
        ("a template that wants user and assistant to alternate, and a conversation that begins with the assistant"),
    ),
    "mask_unsure": Example(
        "a template that prints a reply twice",
    ),
    "nothing_to_train": Example(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}',
        _GOOD,
    ),
    "tool_calls_not_printed": Example(
        "a call of a tool, and a template that prints contents alone",
    ),
    "control_token_in_text": Example(
        (
            '{"messages": [{"role": "user", "content": "What does <|im_end|> do?"}, {"role": "assistant", '
            '"content": "It ends a turn."}]}'
        ),
    ),
    "overlong": Example(
        "a conversation of 9,000 tokens, and --max_length 8192",
    ),
    "tool_calls_as_text": Example(
        "a call of a tool, and a template that prints contents alone",
    ),
    "tools_not_printed": Example(
        "a record with `tools`, and a template that never reads them",
    ),
    "tool_not_printed": Example(
        "a tool's turn, and a template that prints user and assistant alone",
    ),
    "system_not_printed": Example(
        "a system turn, and a template that leaves it out",
    ),
    "developer_not_printed": Example(
        "a developer turn, and a template that leaves it out",
    ),
    "user_not_printed": Example(
        "a template that mends the spelling of questions",
    ),
    "reasoning_not_printed": Example(
        "a reply with `reasoning`, and a template that never reads it",
    ),
    "name_not_printed": Example(
        "a message with `name`, and a template that never reads it",
    ),
    "reply_rewritten": Example(
        "a template that mends the spelling of replies",
    ),
    "reply_without_end": Example(
        "a template that prints no end-of-turn token",
    ),
    "history_rewritten": Example(
        "a template that prints `<think>` in the last reply only",
    ),
}
