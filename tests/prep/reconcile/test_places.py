"""Where a finding says that something is: as the record's author wrote it, whatever the format."""

from __future__ import annotations

import json

import pytest

from dft_prep.reconcile.record import reconcile

CONVERSATION = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "weight": 1},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
]
OPENAI = {"messages": CONVERSATION}
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
EXCHANGES = {"conversation": [{"human": "q", "assistant": "a"}, {"system": "", "input": "r", "output": "b"}]}
THOUGHT = {"role": "assistant", "content": "a", "thinking": "t"}
CALL = {"name": "f", "arguments": {}}
CALLS = {"from": "function_call", "value": json.dumps([CALL, CALL])}
PARTS = {
    "role": "assistant",
    "content": [
        {"type": "reasoning", "value": "r"},
        {"type": "tool_call", "value": json.dumps(CALL)},
        {"type": "tool_call", "value": json.dumps([CALL, CALL])},
    ],
    "tool_calls": [{"function": CALL}],
    "function_call": CALL,
}


@pytest.mark.parametrize(
    ("record", "index", "part", "path"),
    [
        (SHAREGPT, 1, "content", "$.conversations[1].value"),
        (SHAREGPT, 0, "role", "$.conversations[0].from"),
        ({"system": "s", **OPENAI}, 2, "content", "$.messages[1].content"),
        ({"system": "s", **OPENAI}, 0, "content", "$.system"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, 1, "content", "$.history[0][1]"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, 3, "content", "$.output"),
        ({"data": ["q", "a"]}, 1, "content", "$.data[1]"),
        (OPENAI, 1, "tool_calls[0]", "$.messages[1].tool_calls[0]"),
        (OPENAI, -1, "tools[0]", "$.tools[0]"),
        (OPENAI, 3, "", "$.messages[3]"),
        ({"instruction": "", "input": "q", "output": "a"}, 0, "content", "$.input"),
        ({"messages": CONVERSATION, "functions": [{"name": "f"}]}, -1, "tools[0]", "$.functions[0]"),
        (EXCHANGES, 3, "content", "$.conversation[1].output"),
        ({"text": "<|im_start|>assistant\na<|im_end|>"}, 0, "content", "$.text"),
        ({"conversations": [CALLS]}, 0, "tool_calls[1]", "$.conversations[0].value"),
        ({"messages": [PARTS]}, 0, "tool_calls[0]", "$.messages[0].content[1]"),
        ({"messages": [PARTS]}, 0, "tool_calls[2]", "$.messages[0].content[2]"),
        ({"messages": [PARTS]}, 0, "tool_calls[3]", "$.messages[0].tool_calls[0]"),
        ({"messages": [PARTS]}, 0, "tool_calls[4]", "$.messages[0].function_call"),
        ({"messages": [PARTS]}, 0, "reasoning", "$.messages[0].content[0]"),
        ({"messages": [THOUGHT]}, 0, "reasoning", "$.messages[0].thinking"),
    ],
)  # fmt: skip
def test_a_place_is_where_its_author_wrote_it(record, index, part, path):
    assert reconcile(record).place(index, part) == path
