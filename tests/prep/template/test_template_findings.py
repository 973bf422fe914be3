"""With a tokenizer a validation says what the chat template makes of the conversations."""

from __future__ import annotations

import json

import pytest

import tiny
from dft_prep.validate.command import ValidateOptions, run_validate

# Prints the two sides alone, trimmed, and nothing else of a conversation.
BARE = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MENDING = BARE.replace("| trim", "| replace('teh', 'the')")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
# code -> a record that has it, a record that has not, and the template and flags that matter
CASES = {
    "system_not_printed": ([{"role": "system", "content": "s"}, USER, REPLY], [USER, REPLY], BARE, {}),
    "developer_not_printed": ([{"role": "developer", "content": "be brief"}, USER, REPLY], [USER, REPLY], BARE, {}),
    "user_not_printed": ([{"role": "user", "content": "teh"}, REPLY], [USER, REPLY], MENDING, {}),
    "name_not_printed": ([{**USER, "name": "bob"}, REPLY], [USER, REPLY], BARE, {}),
    "reasoning_not_printed": ([USER, {**REPLY, "reasoning": "hmm"}], [USER, REPLY], BARE, {}),
    "reply_rewritten": ([USER, {"role": "assistant", "content": "teh"}], [USER, REPLY], MENDING, {}),
    "tool_calls_as_text": ([USER, CALL], [USER, REPLY], BARE, {}),
    "tool_calls_not_printed": ([USER, CALL], [USER, REPLY], BARE, {"unsupported_tools": "quarantine"}),
    "tool_not_printed": ([USER, CALL, {"role": "tool", "content": "42"}, REPLY], [USER, REPLY], BARE, {}),
    "control_token_in_text": ([{"role": "user", "content": "<|im_end|>"}, REPLY], [USER, REPLY], BARE, {}),
    "overlong": ([USER, {"role": "assistant", "content": "a" * 90}], [USER, REPLY], BARE, {"max_length": 60}),
    "nothing_to_train": ([USER, {**REPLY, "weight": 0}], [USER, REPLY], BARE, {}),
    "template_refused": (
        [{"role": "system", "content": "s"}, USER, REPLY], [USER, REPLY],
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + BARE, {},
    ),
    "reply_without_end": (
        [USER, REPLY], [USER, REPLY, USER],
        BARE.replace("<|im_end|>\n", "{% if not loop.last %}<|im_end|>\n{% endif %}"), {},
    ),
    "history_rewritten": (
        [USER, {**REPLY, "reasoning": "hmm"}, USER, {**REPLY, "reasoning": "oh"}],
        [USER, {**REPLY, "reasoning": "hmm"}],
        BARE.replace(
            "{{ m.content | trim }}",
            "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
            "{{ m.content }}",
        ), {},
    ),
}  # fmt: skip


def codes(tmp_path, capsys, messages, template, flags) -> set[str]:
    model = tiny.write_tokenizer(tmp_path / "model", template)
    record = {"messages": messages, **({"tools": TOOLS} if "tool" in json.dumps(messages) else {})}
    tiny.write_jsonl(tmp_path / "a.jsonl", [record])
    options = ValidateOptions(data_files=(str(tmp_path / "a.jsonl"),), tokenizer=str(model), format="json", **flags)
    run_validate(options)
    return {finding["code"] for finding in json.loads(capsys.readouterr().out)["findings"]}


@pytest.mark.parametrize("code", CASES)
def test_what_the_template_makes_of_it_is_told(tmp_path, capsys, code):
    bad, good, template, flags = CASES[code]
    assert code in codes(tmp_path, capsys, bad, template, flags)
    assert code not in codes(tmp_path, capsys, good, template, flags)


def test_tools_that_are_not_printed_are_told(tmp_path, capsys):
    messages = [USER, CALL, {"role": "tool", "content": "42"}, REPLY]
    assert "tools_not_printed" in codes(tmp_path, capsys, messages, BARE, {})
