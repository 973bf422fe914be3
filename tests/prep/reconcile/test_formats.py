"""Every format of the wild, made from its public description, and what it becomes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_common.records import Message, ToolCall
from dft_prep.reconcile.converters import RecordError
from dft_prep.reconcile.fields import target_of
from dft_prep.reconcile.formats import FORMATS, KNOWN_FIELDS
from dft_prep.reconcile.reading import parse_reading
from dft_prep.reconcile.record import reconcile

TEXT = st.text(max_size=20) | st.sampled_from(
    ["007", "2024-01-01", "1e400", "a\u2028b", "😀", " lead", "trail \n", "null", "\ufeff", "Human: x", "<|im_start|>"]
)

# (first question, first reply, second question, second reply) -> a record of each format
RECORDS = {
    "openai": lambda q, a, r, b: {
        "messages": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": a, "weight": 1},
            {"role": "user", "content": r},
            {"role": "assistant", "content": [{"type": "text", "text": b}]},
        ],
        "parallel_tool_calls": False,
    },
    "sharegpt": lambda q, a, r, b: {
        "conversations": [
            {"from": "human", "value": q},
            {"from": "gpt", "value": a},
            {"from": "human", "value": r},
            {"from": "gpt", "value": b},
        ]
    },
    "sharegpt exchanges": lambda q, a, r, b: {
        "conversation": [{"human": q, "assistant": a}, {"system": "", "input": r, "output": b}]
    },
    "sharegpt roles": lambda q, a, r, b: {
        "conversation": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
            {"role": "user", "content": r},
            {"role": "assistant", "content": b},
        ]
    },
    "sharegpt texts": lambda q, a, r, b: {"conversations": [q, a, r, b], "source": "stackexchange"},
    "alpaca": lambda q, a, r, b: {"instruction": r, "input": "", "output": b, "history": [[q, a]]},
    "ms_swift": lambda q, a, r, b: {"query": r, "response": b, "history": [[q, a]]},
    "ultrachat": lambda q, a, r, b: {"id": "7", "data": [q, a, r, b]},
    "prompt_completion": lambda q, a, r, b: {"prompt": r, "response": b, "history": [[q, a]]},
    "prompt_completion messages": lambda q, a, r, b: {
        "prompt": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
            {"role": "user", "content": r},
        ],
        "completion": [{"role": "assistant", "content": b}],
    },
    "preference messages": lambda q, a, r, b: {
        "prompt": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
            {"role": "user", "content": r},
        ],
        "chosen": [{"role": "assistant", "content": b}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "preference whole": lambda q, a, r, b: {
        "prompt": q,
        "chosen": RECORDS["sharegpt roles"](q, a, r, b)["conversation"],
        "rejected": [],
    },
    "anthropic": lambda q, a, r, b: {
        "messages": [
            {"role": "user", "content": q},
            {"role": "assistant", "content": [{"type": "text", "text": a}]},
            {"role": "user", "content": [{"type": "text", "text": r, "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": b},
        ],
        "system": [],
    },
    "gemini": lambda q, a, r, b: {
        "contents": [
            {"role": "user", "parts": [{"text": q}]},
            {"role": "model", "parts": [{"text": a[:1]}, {"text": a[1:]}]},
            {"role": "user", "parts": [{"text": r}]},
            {"role": "model", "parts": [{"text": b, "thought": False}]},
        ]
    },
    "mistral": lambda q, a, r, b: {
        "messages": RECORDS["sharegpt roles"](q, a, r, b)["conversation"],
        "available_tools": "[]",
    },
}


def said(record, **reading) -> list[tuple[str, str | None]]:
    return [
        (message.role, message.content) for message in reconcile(record, parse_reading(reading)).conversation.messages
    ]


@settings(max_examples=40)
@given(TEXT, TEXT, TEXT.filter(bool), TEXT)
@pytest.mark.parametrize("shape", RECORDS)
def test_no_format_changes_a_character(shape, q, a, r, b):
    record = json.loads(json.dumps(RECORDS[shape](q, a, r, b)))
    assert said(record) == [("user", q), ("assistant", a), ("user", r), ("assistant", b)]
    reconciled = reconcile(record)
    assert reconciled.format == shape.split()[0]
    assert said(record, format=reconciled.format) == said(record), "forced, it is read the same"


@settings(max_examples=60)
@given(TEXT, TEXT)
@pytest.mark.parametrize("question", ["prompt", "question", "input"])
@pytest.mark.parametrize("reply", ["completion", "response", "answer", "output"])
def test_a_question_and_a_reply_by_any_of_their_names(question, reply, q, a):
    record = {question: q, reply: a}
    assert said(record) == [("user", q), ("assistant", a)]
    assert said({"system_prompt": "s", **record}) == [("system", "s"), ("user", q), ("assistant", a)]


# What would be ChatML or a speaker itself inside of a text cannot be told from the text's own.
PLAIN = TEXT.filter(lambda text: "<|im_" not in text and "Human:" not in text and "Assistant:" not in text)


@settings(max_examples=60)
@given(PLAIN, PLAIN)
def test_text_that_is_chatml_already_is_taken_apart(q, a):
    text = f"<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
    assert said({"text": text}) == [("system", "s"), ("user", q), ("assistant", a)]


@settings(max_examples=60)
@given(PLAIN, PLAIN)
def test_a_dialogue_of_human_and_assistant_is_taken_apart(q, a):
    assert said({"chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": "x"}) == [("user", q), ("assistant", a)]
    assert said({"prompt": q, "chosen": a, "rejected": "x"}) == [("user", q), ("assistant", a)]


def test_anthropics_blocks_become_calls_results_and_reasoning():
    record = {
        "system": [{"type": "text", "text": "be brief"}],
        "tools": [{"name": "weather", "description": "d", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": "Oslo?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "text", "text": "Let me look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo", "n": 1.5}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                    {"type": "text", "text": "Well?"},
                ],
            },
            {"role": "assistant", "content": "It rains."},
        ],
    }
    reconciled = reconcile(record)
    call = ToolCall(name="weather", arguments='{"city":"Oslo","n":1.5}', id="t1")
    assert reconciled.format == "anthropic"
    assert reconciled.conversation.messages == (
        Message(role="system", content="be brief"),
        Message(role="user", content="Oslo?"),
        Message(role="assistant", content="Let me look.", reasoning="hm", tool_calls=(call,)),
        Message(role="tool", content="rain", tool_call_id="t1"),
        Message(role="user", content="Well?"),
        Message(role="assistant", content="It rains."),
    )
    (tool,) = reconciled.conversation.tools
    assert tool == {
        "type": "function",
        "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}},
    }
    assert [reconciled.place(number, "content") for number in range(6)] == [
        "$.system",
        "$.messages[0].content",
        "$.messages[1].content",
        "$.messages[2].content[0].content",
        "$.messages[2].content",
        "$.messages[3].content",
    ]
    assert reconciled.place(2, "reasoning") == "$.messages[1].content[0]"
    assert reconciled.place(2, "tool_calls[0]") == "$.messages[1].content[2]"
    assert reconciled.place(3, "tool_call_id") == "$.messages[2].content[0].tool_use_id"


@pytest.mark.parametrize("write", [lambda tools: tools, json.dumps], ids=["list", "text"])
def test_tools_with_an_input_schema_tell_anthropic_by_themselves(write):
    tools = [{"name": "f", "input_schema": {"type": "object"}}, {"type": "web_search", "name": "search"}]
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [CONVERSATION[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    reconciled = reconcile({"tools": write(tools), "messages": messages})
    assert reconciled.format == "anthropic"
    assert reconciled.conversation.tools == (
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
        tools[1],
    )
    assert reconciled.conversation.messages[1].tool_calls == (ToolCall(name="f", arguments="{}", id="t1"),)


def test_what_is_wrong_beside_a_result_is_named_at_its_own_place():
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "rain"}
    for blocks, path in (
        ([result, {"type": "image", "source": {}}], "content[1]"),
        ([{**result, "content": [{"type": "image", "source": {}}]}], "content[0].content[0]"),
    ):
        with pytest.raises(RecordError) as refusal:
            reconcile({"messages": [CONVERSATION[0], CONVERSATION[1], {"role": "user", "content": blocks}]})
        assert (refusal.value.code, refusal.value.path) == ("media_part", f"$.messages[2].{path}")


def test_a_result_within_the_assistants_turn_is_refused_for_no_one_turn_has_that_order():
    use = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    blocks = [use, {"type": "tool_result", "tool_use_id": "1", "content": "r"}, {"type": "text", "text": "after"}]
    with pytest.raises(RecordError) as refusal:
        reconcile({"messages": [CONVERSATION[0], {"role": "assistant", "content": blocks}]})
    assert (refusal.value.code, refusal.value.path) == ("unsupported_part", "$.messages[1].content[1]")


def test_chatml_whose_lines_end_with_cr_lf_keeps_them_in_its_texts_alone():
    text = "<|im_start|>user\r\nq\r\nq<|im_end|>\r\n<|im_start|>assistant\r\na\r\n<|im_end|>\r\n"
    assert said({"text": text}) == [("user", "q\r\nq"), ("assistant", "a\r\n")]


THINKING, TEXT = {"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("blocks", "at"),
    [([THINKING, TEXT, THINKING, TEXT], 2), ([USE, TEXT], 1), ([USE, "a"], 1), ([THINKING, USE, THINKING, USE], 2)],
)
def test_blocks_in_an_order_that_no_turn_has_are_refused(blocks, at):
    """They were joined as reasoning, text and calls: what was trained had never been said so."""
    with pytest.raises(RecordError) as refusal:
        reconcile({"messages": [CONVERSATION[0], {"role": "assistant", "content": blocks}]})
    assert (refusal.value.code, refusal.value.path) == ("unsupported_part", f"$.messages[1].content[{at}]")


def test_white_space_between_blocks_has_no_order():
    blocks = [{"type": "text", "text": "\n\n"}, THINKING, THINKING, TEXT, TEXT, USE, {"type": "text", "text": ""}, USE]
    message = reconcile(
        {"messages": [CONVERSATION[0], {"role": "assistant", "content": blocks}]}
    ).conversation.messages[1]
    assert (message.reasoning, message.content, len(message.tool_calls)) == ("tt", "\n\naa", 2)


@pytest.mark.parametrize("write", [lambda calls: calls, json.dumps], ids=["list", "text"])
def test_xlams_answers_are_the_calls_of_the_reply(write):
    record = {"id": 7, "query": "q", "answers": write([{"name": "f", "arguments": {"n": 1}}, {"name": "g"}])}
    reconciled = reconcile({**record, "tools": '[{"name": "f", "parameters": {"n": {"type": "int"}}}, {"name": "g"}]'})
    assert reconciled.format == "xlam"
    reply = reconciled.conversation.messages[1]
    assert (reply.role, reply.content) == ("assistant", None)
    calls = [(call.name, call.arguments.replace(" ", "")) for call in reply.tool_calls]
    assert calls == [("f", '{"n":1}'), ("g", "{}")]
    assert reconciled.place(1, "tool_calls[1]") == "$.answers"
    assert len(reconciled.conversation.tools) == 2
    with pytest.raises(RecordError) as refusal:
        reconcile({"query": "q", "answers": ["a text, as of MS MARCO"]})
    assert (refusal.value.code, refusal.value.path) == ("null_content", "$.response")


def test_geminis_parts_become_calls_results_and_reasoning():
    record = {
        "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
        "tools": [{"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT"}}, {"name": "g"}]}],
        "contents": [
            {"role": "user", "parts": [{"text": "q"}]},
            {
                "role": "model",
                "parts": [{"text": "hm", "thought": True}, {"functionCall": {"name": "f", "args": {"n": 1.5}}}],
            },
            {"role": "function", "parts": [{"functionResponse": {"name": "f", "response": {"é": [1]}}}]},
            {"role": "model", "parts": [{"text": "a"}]},
        ],
    }
    reconciled = reconcile(record)
    assert reconciled.format == "gemini"
    assert reconciled.conversation.messages == (
        Message(role="system", content="s"),
        Message(role="user", content="q"),
        Message(
            role="assistant", content=None, reasoning="hm", tool_calls=(ToolCall(name="f", arguments='{"n":1.5}'),)
        ),
        Message(role="tool", content='{"é":[1]}', name="f"),
        Message(role="assistant", content="a"),
    )
    assert [tool["name"] for tool in reconciled.conversation.tools] == ["f", "g"]
    assert reconciled.place(3, "content") == "$.contents[2].parts[0]"


@pytest.mark.parametrize(
    ("parts", "code", "path"),
    [
        ([{"text": "a"}, {"inlineData": {"mimeType": "image/png", "data": ""}}], "media_part", ".parts[1]"),
        ([{"executableCode": {"code": "x"}}], "unsupported_part", ".parts[0]"),
        ([{"functionResponse": {"name": "f", "response": {}}}], "unsupported_part", ".parts[0]"),
        ([{"functionCall": {"args": {}}}], "bad_tool_calls", ".parts[0]"),
        ([], "null_content", ".parts"),
        ("a", "content_type", ""),
    ],
)
def test_geminis_parts_that_cannot_be_read_are_refused(parts, code, path):
    contents = [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": parts}]
    with pytest.raises(RecordError) as refusal:
        reconcile({"contents": contents})
    assert (refusal.value.code, refusal.value.path) == (code, f"$.contents[1]{path}")


def test_mistrals_results_may_be_objects():
    record = {
        "available_tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"id": "VvvODy9mT", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "VvvODy9mT", "content": {"é": [1, None]}},
            {"role": "assistant", "content": "a"},
        ],
    }
    conversation = reconcile(record).conversation
    assert conversation.messages[2].content == '{"é":[1,null]}'
    assert conversation.messages[1].tool_calls[0].id == "VvvODy9mT"
    assert len(conversation.tools) == 1


CONVERSATION = RECORDS["sharegpt roles"]("q", "a", "r", "b")["conversation"]


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"prompt": "q", "prompt_id": "7", "messages": CONVERSATION}, "openai"),
        ({"chosen": CONVERSATION, "rejected": [], "prompt": "q", "messages": CONVERSATION}, "openai"),
        ({"messages": CONVERSATION, "conversations": []}, "openai"),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca"),
        ({"messages": CONVERSATION, "text": "rendered, but as no ChatML"}, "openai"),
        ({"messages": CONVERSATION, "data": {"source": "x"}}, "openai"),
        ({"messages": CONVERSATION, "prompt": "q", "completion": ""}, "openai"),
        ({"messages": CONVERSATION, "question": "q", "answer": 42}, "openai"),
        ({"query": "q", "response": "a", "prompt": ""}, "ms_swift"),
        ({"messages": CONVERSATION, "rejected_response": "no"}, "openai"),
    ],
    ids=[
        *("ultrachat-200k", "ultrafeedback", "an-empty-other", "alpaca-input", "rendered", "data", "an-empty-reply"),
        *("a-number", "an-empty-question", "ms-swift-preference"),
    ],
)
def test_evidence_decides_where_only_one_reading_is_possible(record, form):
    assert reconcile(record).format == form


@pytest.mark.parametrize(
    ("record", "choices"),
    [
        ({"messages": CONVERSATION, "conversations": [{"from": "gpt", "value": "x"}]}, ("openai", "sharegpt")),
        ({"messages": CONVERSATION, "prompt": "q", "completion": "a"}, ("openai", "prompt_completion")),
        ({"prompt": "q", "completion": "a", "response": "b"}, ("completion", "response")),
        ({"query": "q", "response": "a", "prompt": "p"}, ("ms_swift", "prompt_completion")),
        ({"instruction": "q", "output": "a", "response": "b"}, ("output", "response")),
        ({"prompt": "q", "question": "r", "chosen": "a"}, ("prompt", "question")),
        ({"messages": CONVERSATION, "tools": [{"name": "f"}], "functions": [{"name": "g"}]}, ("tools", "functions")),
        ({"messages": CONVERSATION, "system": "s", "system_prompt": "t"}, ("system", "system_prompt")),
    ],
    ids=[
        *("two-lists", "list-and-pair", "two-replies", "two-questions", "two-outputs", "two-prompts"),
        *("two-lists-of-tools", "two-systems"),
    ],
)
def test_ambiguity_is_an_error_with_the_choices(record, choices):
    with pytest.raises(RecordError) as refusal:
        reconcile(record)
    assert refusal.value.code == "ambiguous_shape"
    assert all(choice in refusal.value.message for choice in choices)
    assert "recipe" in refusal.value.help


def test_what_says_the_same_twice_is_no_ambiguity():
    system = [{"role": "system", "content": "s"}, *CONVERSATION]
    expected = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    assert said({"system": "s", "system_prompt": "s", "messages": system}) == expected
    assert said({"prompt": "q", "question": "q", "output": "", "completion": "a"}) == [
        ("user", "q"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na"}, "unknown_shape"),
        ({"text": "<|im_start|>user\nq<|im_end|>and more<|im_start|>assistant\na<|im_end|>"}, "unknown_shape"),
        ({"text": "<|im_start|>user\n<|im_start|>assistant\na<|im_end|>"}, "unknown_shape"),
        ({"text": "just text"}, "unknown_shape"),
        ({"chosen": "a", "rejected": "b"}, "unknown_shape"),
        ({"data": ["q", 7], "text": "x"}, "unknown_shape"),
        ({"query": "q"}, "null_content"),
        ({"conversations": ["q", {"from": "gpt", "value": "a"}]}, "content_type"),
        ({"conversations": [{"from": "human", "value": "q"}, "a"]}, "content_type"),
        ({"query": "q", "response": 7}, "content_type"),
        ({"conversation": [{"human": "q", "assistant": 7}]}, "content_type"),
    ],
    ids=str,
)
def test_what_does_not_read_as_a_whole_is_refused(record, code):
    with pytest.raises(RecordError) as refusal:
        reconcile(record)
    assert refusal.value.code == code


def test_a_whole_exchange_keeps_what_is_said_of_its_reply():
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    exchange = {"human": "q", "assistant": "a", "weight": 0, "reasoning_content": "r", "tool_calls": [call]}
    more = {"human": "r", "assistant": "trained"}
    reply = reconcile({"conversation": [exchange, more]}).conversation.messages[1]
    calls = (ToolCall(name="f", arguments="{}", id="1"),)
    assert reply == Message(role="assistant", content="a", weight=0.0, reasoning="r", tool_calls=calls)


@pytest.mark.parametrize(
    ("more", "code", "path"),
    [
        ({"images": ["a.png"]}, "media_part", "$.conversation[0].images"),
        ({"bot": "b"}, "ambiguous_shape", "$.conversation[0]"),
        ({"user": "r"}, "ambiguous_shape", "$.conversation[0]"),
        ({"weight": 2}, "bad_weight", "$.conversation[0].weight"),
    ],
)
def test_an_exchange_that_cannot_be_read_is_refused(more, code, path):
    with pytest.raises(RecordError) as refusal:
        reconcile({"conversation": [{"human": "q", "assistant": "a", **more}]})
    assert (refusal.value.code, refusal.value.path) == (code, path)


@pytest.mark.parametrize(
    ("record", "help"),
    [
        ({"problem": "q", "solution": "a"}, "`fields: {prompt: $.problem, completion: $.solution}`"),
        ({"id": 1, "items": [{"from": "human"}]}, "`fields: {messages: $.items}`"),
        ({"kind": "k", "input": "q", "target": "a"}, "`fields: {prompt: $.QUESTION, completion: $.REPLY}`"),
        ({"\ud800": "q", "a.b": "a"}, "`fields: {prompt: $.ITS_NAME, completion: $.ITS_NAME}`"),
        (
            {"input": {"messages": [CONVERSATION[0]]}, "preferred_output": [CONVERSATION[1]]},
            "`fields: {messages: $.input.messages, chosen: $.preferred_output}`",
        ),
        ({"message_id": "1", "parent_id": None, "text": "q", "role": "prompter"}, "each path from its root"),
        ({"prompt": {"text": "q", "replies": []}}, "each path from its root"),
        ({"role": "user", "content": "q"}, 'it is one message: a record is a whole conversation, {"messages": [...]}'),
        ([{"role": "user", "content": "q"}], 'write {"messages": [...]}, if these are messages'),
        ({"system": "s", "chat": "USER: q\n\n\nASSISTANT: a"}, "write its turns as `messages`"),
        ({"text": "<s>[INST] q [/INST] a"}, "write its turns as `messages`"),
        ({"instruction": "i", "answer": "a"}, "`fields: {output: $.ITS_NAME}`"),
        ({"messages": [{"author": "user", "content": "q"}]}, '`fields: {"messages[].role": ITS_NAME}`'),
        ({"messages": [{"role": "user", "text": "q"}]}, '`fields: {"messages[].content": ITS_NAME}`'),
        ({"messages": [{"role": "User", "content": "q"}]}, "did you mean 'user'? rename it, or map it with `roles`"),
    ],
)
def test_what_is_of_no_known_format_is_told_the_way_out(record, help):
    with pytest.raises(RecordError) as refusal:
        reconcile(record)
    assert help in refusal.value.help


DOC = (Path(__file__).resolve().parents[3] / "docs" / "formats.md").read_text("utf-8")
EXAMPLES = re.findall(r"^\| `(\w+)` \| .* \| `(\{.*\})` \|$", DOC, re.MULTILINE)


def test_the_docs_have_an_example_of_every_format():
    assert [name for name, _ in EXAMPLES] == list(FORMATS)


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_of_the_docs_is_what_it_says(name, example):
    reconciled = reconcile(json.loads(example.replace("\\|", "|")))
    assert reconciled.format == name
    reply = reconciled.conversation.messages[-1]
    assert (reply.role, reply.content) == ("assistant", None if reply.tool_calls else "a")


@pytest.mark.parametrize("name", FORMATS)
def test_every_field_of_a_format_is_known_and_has_a_target(name):
    for path in FORMATS[name].fields:
        assert path.split("[")[0] in KNOWN_FIELDS
        assert target_of(name, path) is not None
        assert target_of(name, path.split("[")[0]) is not None
