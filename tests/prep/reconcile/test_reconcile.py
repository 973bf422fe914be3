from __future__ import annotations

import copy
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dft_common.records import Message, ToolCall
from dft_prep.codes.table import CODES
from dft_prep.reconcile.converters import RecordError
from dft_prep.reconcile.fields import FieldCounts, field_uses, fields_of
from dft_prep.reconcile.record import Reconciled, reconcile

TEXTS = st.text(max_size=30) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "007",
        "2024-01-01",
        "a",
        "\u2028",
        "\x00",
        "\r\n",
        "\ufeff",
        "<think>",
        "null",
        "[]",
        '{"a": 1}',
        "😀",
    ]
)

# (question, reply) -> a record of each shape
SHAPES = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "messages with nulls": lambda q, a: {
        "messages": [{"role": "user", "content": q, "name": None}, {"role": "assistant", "content": a, "weight": None}],
        "tools": None,
        "conversations": None,
    },
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "sharegpt named as messages": lambda q, a: {
        "messages": [{"from": "user", "value": q}, {"from": "gpt", "value": a}]
    },
    "conversations of roles": lambda q, a: {
        "conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "text parts": lambda q, a: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": q}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "value": a[:2]}, a[2:3], {"type": "text", "content": a[3:]}],
            },
        ]
    },
    "parts as Parquet gives them": lambda q, a: {
        "messages": [
            {
                "role": "user",
                "content": [{"type": None, "text": q, "image_url": None}],
                "function_call": {"name": None},
            },
            {"role": "assistant", "content": [{"type": "text", "text": a}], "tool_calls": [], "function_call": None},
        ]
    },
}


@settings(max_examples=150)
@given(TEXTS, TEXTS)
@example("\u2028 \r\n", "  leading, trailing \n\n")
@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_changes_a_character(shape, question, reply):
    record = SHAPES[shape](question, reply)
    before = copy.deepcopy(record)
    messages = reconcile(record).conversation.messages
    assert messages == (Message(role="user", content=question), Message(role="assistant", content=reply))
    assert record == before


@settings(max_examples=150)
@given(TEXTS.filter(bool), TEXTS, TEXTS)
def test_alpaca_joins_instruction_and_input_by_one_newline_and_adds_nothing(instruction, extra, reply):
    for key in ("output", "response"):
        messages = reconcile({"instruction": instruction, "input": extra, key: reply}).conversation.messages
        question = f"{instruction}\n{extra}" if extra else instruction
        assert messages == (Message(role="user", content=question), Message(role="assistant", content=reply))


def test_dollys_context_is_alpacas_input():
    dolly = {"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"}
    assert turns(dolly) == [("user", "q\nc"), ("assistant", "a")]
    assert turns({**dolly, "context": ""}) == [("user", "q"), ("assistant", "a")]
    assert turns({**dolly, "input": "c"}) == turns(dolly)
    assert reconcile({**dolly, "instruction": ""}).place(0, "content") == "$.context"
    with pytest.raises(RecordError, match="`input` and `context`"):
        reconcile({**dolly, "input": "i"})


def turns(record) -> list[tuple[str, str | None]]:
    return [(message.role, message.content) for message in reconcile(record).conversation.messages]


def test_alpaca_history_and_system_come_before_the_question():
    record = {
        "system": "s",
        "history": [["q1", "a1"], ["q2", "a2"]],
        "instruction": "q3",
        "input": None,
        "output": "a3",
    }
    expected = [("system", "s")]
    for number in "123":
        expected += [("user", f"q{number}"), ("assistant", f"a{number}")]
    assert turns(record) == expected


@pytest.mark.parametrize("shape", ["messages", "sharegpt"])
def test_a_system_field_is_the_first_turn(shape):
    record = {"system": "be brief", **SHAPES[shape]("q", "a")}
    assert turns(record) == [("system", "be brief"), ("user", "q"), ("assistant", "a")]
    assert turns({**record, "system": ""}) == [("user", "q"), ("assistant", "a")]


ROLES = {
    "system": ["system"],
    "developer": ["developer"],
    "user": ["user", "human"],
    "assistant": ["assistant", "gpt", "chatgpt", "model", "bot"],
    "tool": ["tool", "function", "observation", "tool_response", "ipython"],
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in ROLES.items() for name in names])
def test_every_role_name_of_sharegpt_is_known(role, name):
    record = {"conversations": [{"from": name, "value": "x"}, {"from": "gpt", "value": "a"}]}
    assert turns(record)[0] == (role, "x")


def reply(**fields) -> Message:
    """The assistant's message of a record that gives it `fields`."""
    trained = {"role": "assistant", "content": "trained"}
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **fields}, trained]}
    return reconcile(record).conversation.messages[1]


def test_openai_tool_calls_keep_their_arguments():
    text = '{"n":  1.10, "big": 12345678901234567890, "s": "é"}'
    message = reply(
        content=None,
        tool_calls=[
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": text}},
            {"id": None, "function": {"name": "g", "arguments": {"é": [1, 12345678901234567890, True, None]}}},
            {"name": "h", "function": None, "arguments": None},
        ],
    )
    assert message.content is None
    assert message.tool_calls == (
        ToolCall(name="f", arguments=text, id="c1"),
        ToolCall(name="g", arguments='{"é":[1,12345678901234567890,true,null]}'),
        ToolCall(name="h", arguments="{}"),
    )


def test_a_legacy_function_call_is_a_tool_call():
    assert reply(content=None, function_call={"name": "f", "arguments": "{}"}).tool_calls == (
        ToolCall(name="f", arguments="{}"),
    )


def test_a_sharegpt_call_keeps_its_text_and_its_arguments_as_written():
    text = '{"name": "f", "arguments": {"x": 1.10, "y":[1, 2]}}'
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": text},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "a"},
        ]
    }
    _, call, result, _ = reconcile(record).conversation.messages
    assert (call.role, call.content, result.role) == ("assistant", None, "tool")
    assert call.tool_calls == (ToolCall(name="f", arguments='{"x": 1.10, "y":[1, 2]}', verbatim=text),)
    record["conversations"][1]["value"] = f"[{text}, {text}]"
    call = reconcile(record).conversation.messages[1]
    assert [each.name for each in call.tool_calls] == ["f", "f"]


@pytest.mark.parametrize("kind", ["reasoning", "thinking"])
def test_reasoning_comes_from_parts_and_from_fields(kind):
    parts = [{"type": kind, "value": " hm\n"}, {"type": "text", "value": "a"}]
    assert reply(content=parts) == Message(role="assistant", content="a", reasoning=" hm\n")
    for field in ("reasoning_content", "reasoning", "thinking"):
        assert reply(content="a", **{field: "hm"}) == Message(role="assistant", content="a", reasoning="hm")


def test_a_reply_of_reasoning_alone_says_nothing():
    for fields in ({"content": None, "reasoning": "r"}, {"content": [{"type": "reasoning", "value": "r"}]}):
        assert reply(**fields) == Message(role="assistant", content="", reasoning="r")


def test_tool_call_parts_are_calls_and_a_turn_of_calls_alone_has_no_content():
    text = '{"name": "f", "arguments": {"title": "Inception"}}'
    message = reply(content=[{"type": "reasoning", "value": "r"}, {"type": "tool_call", "value": text}])
    assert (message.content, message.reasoning) == (None, "r")
    assert message.tool_calls == (ToolCall(name="f", arguments='{"title": "Inception"}', verbatim=text),)


@pytest.mark.parametrize("key", ["weight", "train", "loss_weight", "loss"])
def test_a_weight_is_a_truth_or_a_number_from_0_to_1(key):
    assert [reply(content="a", **{key: value}).weight for value in (0, False, 1, True, 0.25, None)] == [
        0.0,
        0.0,
        1.0,
        1.0,
        0.25,
        1.0,
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "a", "weight": 1, "train": False},
        {"content": "a", "reasoning": "r", "reasoning_content": "s"},
        {"content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}], "reasoning": "s"},
        {"content": "a", "value": "b"},
        {"content": "a", "from": "human"},
    ],
    ids=["weights", "reasoning", "reasoning-in-parts", "contents", "roles"],
)
def test_fields_of_a_message_that_contradict_each_other_are_ambiguous(fields):
    with pytest.raises(RecordError) as refusal:
        reply(**fields)
    assert (refusal.value.code, refusal.value.path) == ("ambiguous_shape", "$.messages[1]")
    assert "recipe" in refusal.value.help
    assert all(f"`{key}`" in refusal.value.message for key in fields if key != "content" or "value" in fields)


def test_fields_of_a_message_that_agree_or_are_empty_are_no_contradiction():
    message = reply(
        **{"content": "", "value": "a", "from": "gpt", "weight": 0, "train": False, "reasoning": "r"},
        reasoning_content="",
        thinking="r",
    )
    assert message == Message(role="assistant", content="a", reasoning="r", weight=0.0)


def test_a_conversation_of_context_alone_is_known_without_a_tokenizer():
    record = SHAPES["messages"]("q", "a")
    record["messages"][1]["weight"] = 0
    with pytest.raises(RecordError) as refusal:
        reconcile(record)
    assert (refusal.value.code, refusal.value.path) == ("nothing_to_train", "$.messages")


@pytest.mark.parametrize("tools", [[{"name": "f", "p": 1.5}], '[{"name": "f", "p": 1.5}]'])
def test_tools_are_a_list_or_its_json(tools):
    assert reconcile({**SHAPES["sharegpt"]("q", "a"), "tools": tools}).conversation.tools == ({"name": "f", "p": 1.5},)


@pytest.mark.parametrize("tools", [['{"name": "f"}', "f(x): as said"], json.dumps(['{"name": "f"}', "f(x): as said"])])
def test_each_tool_may_be_json_text_or_its_authors_own_words(tools):
    expected = ({"name": "f"}, "f(x): as said")
    assert reconcile({**SHAPES["messages"]("q", "a"), "tools": tools}).conversation.tools == expected


HALF = '"\\ud800"'


@pytest.mark.parametrize(
    ("record", "code", "path"),
    [
        ({"tools": f'[{{"name": {HALF}}}]'}, "lone_surrogate", "$.tools"),
        ({"tools": [f'{{"name": {HALF}}}']}, "lone_surrogate", "$.tools[0]"),
        ({"tools": '[{"name": "f", "p": 1e999}]'}, "bad_tools", "$.tools"),
        ({"tools": ['{"name": "f"']}, "bad_tools", "$.tools[0]"),
        ({"call": {"name": "f", "arguments": f'{{"x": {HALF}}}'}}, "lone_surrogate", "$.messages[1].tool_calls[0]"),
        ({"call": {"name": "f", "arguments": '{"x": [-1e999]}'}}, "bad_tool_calls", "$.messages[1].tool_calls[0]"),
        (
            {"call": {"name": "f", "arguments": f'{{"x": 1{"0" * 5000}}}'}},
            "bad_tool_calls",
            "$.messages[1].tool_calls[0]",
        ),
        (
            {"call": {"function": {"name": "f", "arguments": f'{{"x": {HALF}}}'}}},
            "lone_surrogate",
            "$.messages[1].tool_calls[0]",
        ),
    ],
)
def test_json_within_a_text_may_hold_nothing_that_cannot_be_written(record, code, path):
    """A whole build ended in a traceback at a template that takes arguments or tools as objects."""
    messages = SHAPES["messages"]("q", "a")["messages"]
    if "call" in record:
        messages[1]["tool_calls"] = [record.pop("call")]
    with pytest.raises(RecordError) as refusal:
        reconcile({"messages": messages, **record})
    assert refusal.value.code == code
    assert refusal.value.path.removesuffix(".arguments") == path


@pytest.mark.parametrize("write", [lambda calls: calls, json.dumps], ids=["list", "text"])
def test_calls_in_any_of_their_forms_may_be_json_text(write):
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}},
        {"name": "g", "parameters": {"b": 2}},
        {"name": "h", "arguments": None},
    ]
    message = reply(content="", tool_calls=write(calls))
    assert [(call.id, call.name, call.arguments.replace(" ", "")) for call in message.tool_calls] == [
        ("1", "f", '{"a":1}'),
        (None, "g", '{"b":2}'),
        (None, "h", "{}"),
    ]
    assert message.tool_calls[0].arguments == '{"a":  1}'


@pytest.mark.parametrize("arguments", ['{"x": "1e999"}', '{"x": 1e300}', '{"x": 1e-999}', '{"x": 1e999', "1e999 x"])
def test_arguments_that_print_as_they_are_written_are_kept(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    assert reply(content=None, tool_calls=[call]).tool_calls[0].arguments == arguments


def test_a_call_in_the_older_and_the_newer_field_is_one_call():
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": "1", "type": "function", "function": function}]
    message = reply(content=None, tool_calls=calls, function_call=function)
    assert message.tool_calls == (ToolCall(name="f", arguments="{}", id="1"),)
    with pytest.raises(RecordError, match="`tool_calls` and `function_call`"):
        reply(content=None, tool_calls=calls, function_call={"name": "g", "arguments": "{}"})


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_may_be_said_in_many_ways(tools):
    assert reconcile({**SHAPES["messages"]("q", "a"), "tools": tools}).conversation.tools == ()


@pytest.mark.parametrize(
    "nothing", [None, [], "", {}, {"bytes": None, "path": None}, [None], False], ids=lambda nothing: json.dumps(nothing)
)
def test_no_picture_may_be_said_in_many_ways(nothing):
    record = SHAPES["messages"]("q", "a")
    record["messages"][0]["images"] = nothing
    assert turns({**record, "image": nothing}) == [("user", "q"), ("assistant", "a")]


def test_calls_and_results_may_be_turns_of_their_own_among_messages():
    call = '{"name": "f", "arguments": {}}'
    record = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "tool_call", "content": call},
            {"role": "tool_response", "content": "42"},
            {"role": "assistant", "content": "a"},
        ]
    }
    _, called, result, _ = reconcile(record).conversation.messages
    assert called.tool_calls == (ToolCall(name="f", arguments="{}", verbatim=call),)
    assert (called.role, result.role, result.content) == ("assistant", "tool", "42")


def test_names_and_call_ids_are_kept():
    record = {
        "messages": [
            {"role": "user", "content": "q", "name": "bob"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
            {"role": "tool", "content": "42", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "a"},
        ]
    }
    user, _, tool, _ = reconcile(record).conversation.messages
    assert user.name == "bob"
    assert (tool.tool_call_id, tool.name) == ("1", "f")


def unused(record) -> list[str]:
    """The fields that a report says are not used."""
    counts = FieldCounts()
    form = reconcile(record).format
    counts.add((form, fields_of(record, form)))
    return [use.path for use in field_uses([counts.counts()]) if use.target is None and use.type != "null"]


def test_fields_that_are_not_understood_are_told_and_null_ones_are_absent():
    record = {
        "id": 7,
        "meta": {"a": 1},
        "score": None,
        "messages": [
            {"role": "user", "content": "q", "ts": 1, "x": None},
            {"role": "assistant", "content": "a", "ts": 2},
        ],
    }
    assert sorted(unused(record)) == ["id", "messages[].ts", "meta"]


def test_field_names_are_told_short_and_in_whole_characters():
    ignored = unused({"\ud800": 1, "k" * 5000: 1, **SHAPES["messages"]("q", "a")})
    assert "\\ud800" in ignored
    assert max(map(len, ignored)) < 100


M = SHAPES["messages"]("q", "a")["messages"]
BAD = {
    "a list": ([M], "not_an_object", "$"),
    "a number": (5, "not_an_object", "$"),
    "no shape": ({"prompt": "x"}, "unknown_shape", "$"),
    "no keys": ({}, "unknown_shape", "$"),
    "no messages": ({"messages": []}, "empty_conversation", "$.messages"),
    "null messages": ({"messages": None}, "empty_conversation", "$"),
    "messages of text": ({"messages": "q"}, "content_type", "$.messages"),
    "a message of text": ({"messages": ["q"]}, "content_type", "$.messages[0]"),
    "two shapes": ({"messages": M, "instruction": "x", "output": "y"}, "ambiguous_shape", "$"),
    "two systems": (
        {"system": "x", "messages": [{"role": "system", "content": "y"}, *M]},
        "ambiguous_shape",
        "$.system",
    ),
    "only a question": ({"messages": M[:1]}, "no_assistant", "$.messages"),
    "a role": ({"messages": [*M, {"role": "asistant", "content": "x"}]}, "unknown_role", "$.messages[2].role"),
    "a role with a space": ({"messages": [{"role": "user ", "content": "x"}]}, "unknown_role", "$.messages[0].role"),
    "no role": ({"messages": [{"content": "x"}]}, "unknown_role", "$.messages[0].role"),
    "a role of a list": ({"messages": [{"role": [], "content": "x"}]}, "unknown_role", "$.messages[0].role"),
    "a speaker": ({"conversations": [{"from": "hooman", "value": "x"}]}, "unknown_role", "$.conversations[0].from"),
    "null content": ({"messages": [*M, {"role": "user", "content": None}]}, "null_content", "$.messages[2].content"),
    "no content": ({"messages": [*M, {"role": "assistant"}]}, "null_content", "$.messages[2].content"),
    "no parts": ({"messages": [*M, {"role": "user", "content": []}]}, "null_content", "$.messages[2].content"),
    "a number as content": (
        {"messages": [*M, {"role": "user", "content": 7}]},
        "content_type",
        "$.messages[2].content",
    ),
    "a truth as content": ({"messages": [{"role": "user", "content": True}]}, "content_type", "$.messages[0].content"),
    "a number in a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]},
        "content_type",
        "$.messages[0].content[0]",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "media_part",
        "$.messages[0].content[0]",
    ),
    "an image without a type": (
        {"messages": [{"role": "user", "content": [{"type": None, "text": None, "image_url": {"url": "x"}}]}]},
        "media_part",
        "$.messages[0].content[0]",
    ),
    "an unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        "unsupported_part",
        "$.messages[0].content[0]",
    ),
    "images beside the messages": ({"messages": M, "images": ["cat.png"]}, "media_part", "$.images"),
    "images in a message": (
        {"messages": [{**M[0], "images": ["cat.png"]}, M[1]]},
        "media_part",
        "$.messages[0].images",
    ),
    "a reply that is spoken": (
        {"messages": [M[0], {**M[1], "audio": {"id": "x"}}]},
        "media_part",
        "$.messages[1].audio",
    ),
    "a name of a number": (
        {"messages": [{"role": "user", "content": "x", "name": 7}]},
        "content_type",
        "$.messages[0].name",
    ),
    "a weight of 2": ({"messages": [{**M[1], "weight": 2}]}, "bad_weight", "$.messages[0].weight"),
    "a weight of text": ({"messages": [{**M[1], "train": "no"}]}, "bad_weight", "$.messages[0].train"),
    "a call without a name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
        "bad_tool_calls",
        "$.messages[0].tool_calls[0]",
    ),
    "calls of a number": ({"messages": [{**M[1], "tool_calls": 5}]}, "bad_tool_calls", "$.messages[0].tool_calls"),
    "a user that calls": (
        {"messages": [{**M[0], "tool_calls": [{"function": {"name": "f"}}]}, M[1]]},
        "bad_tool_calls",
        "$.messages[0]",
    ),
    "infinite arguments": (
        {"messages": [{**M[1], "tool_calls": [{"function": {"name": "f", "arguments": {"a": float("inf")}}}]}]},
        "bad_tool_calls",
        "$.messages[0].tool_calls[0].arguments",
    ),
    "tools that are no JSON": ({"messages": M, "tools": "[{"}, "bad_tools", "$.tools"),
    "tools of numbers": ({"messages": M, "tools": [1]}, "bad_tools", "$.tools"),
    "no instruction": ({"instruction": "", "output": "a"}, "empty_conversation", "$.instruction"),
    "no output": ({"instruction": "q"}, "null_content", "$.output"),
    "a null output": ({"instruction": "q", "output": None}, "null_content", "$.output"),
    "an output of a number": ({"instruction": "q", "output": 7}, "content_type", "$.output"),
    "an input of a list": ({"instruction": "q", "input": [], "output": "a"}, "content_type", "$.input"),
    "a history of a number": ({"instruction": "q", "output": "a", "history": 5}, "content_type", "$.history"),
    "a history of triples": (
        {"instruction": "q", "output": "a", "history": [[1, 2, 3]]},
        "content_type",
        "$.history[0]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_has_a_code_a_path_and_a_remedy(name):
    record, code, path = BAD[name]
    with pytest.raises(RecordError) as raised:
        reconcile(record)
    error = raised.value
    assert (error.code, error.path) == (code, path)
    assert code in CODES
    assert error.message and error.help


def test_the_nearest_known_role_is_named_and_a_long_one_is_cut():
    with pytest.raises(RecordError) as raised:
        reconcile({"messages": [{"role": "asistant", "content": "x"}]})
    assert "'assistant'" in raised.value.help
    with pytest.raises(RecordError) as raised:
        reconcile({"messages": [{"role": "x" * 100_000, "content": "x"}]})
    assert len(raised.value.message) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *[
                        "messages",
                        "conversations",
                        "role",
                        "from",
                        "content",
                        "value",
                        "type",
                        "text",
                        "tool_calls",
                        "function",
                    ],
                    *[
                        "name",
                        "arguments",
                        "weight",
                        "tools",
                        "system",
                        "instruction",
                        "output",
                        "history",
                        "function_call",
                    ],
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=25,
)


@settings(max_examples=400)
@given(JSON, st.sampled_from(["messages", "conversations", "instruction"]))
def test_any_json_is_taken_or_refused_with_a_known_code(value, key):
    for record in (value, {key: value, "output": "x"}, {key: [value, {"role": "assistant", "content": "a"}]}):
        try:
            found = reconcile(record)
        except RecordError as error:
            assert error.code in CODES
        else:
            assert isinstance(found, Reconciled)
            json.dumps([found.place(number, "content") for number in range(-1, len(found.conversation.messages))])
