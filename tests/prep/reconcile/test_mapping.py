"""What a recipe may say of how a source is read: the format, the fields by their path, the roles by their name."""

from __future__ import annotations

import pytest

from dft_common.errors import SetupError
from dft_common.records import Finding
from dft_prep.judge.judgement import Judge, Judged
from dft_prep.reconcile.converters import RecordError
from dft_prep.reconcile.fields import field_uses
from dft_prep.reconcile.reading import parse_reading
from dft_prep.reconcile.record import reconcile
from dft_prep.sources.readers import RawRecord


def said(record, **reading) -> list[tuple[str, str | None]]:
    messages = reconcile(record, parse_reading(reading)).conversation.messages
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize("field", ["completion", "response"])
def test_mapping_one_of_two_fields_chooses_it(field):
    record = {"prompt": "q", "completion": "of completion", "response": "of response"}
    assert said(record, fields={field: f"$.{field}"}) == [("user", "q"), ("assistant", f"of {field}")]


def test_mapping_one_of_two_fields_of_a_message_chooses_it():
    turn = {"role": "assistant", "content": "of content", "value": "of value", "weight": 1, "train": False}
    trained = {"role": "assistant", "value": "trained", "train": True}
    record = {"messages": [{"role": "user", "content": "q", "value": "q", "train": True}, turn, trained]}
    with pytest.raises(RecordError, match="differ"):
        reconcile(record)
    mapping = {"messages[].content": "value", "messages[].weight": "train"}
    message = reconcile(record, parse_reading({"fields": mapping})).conversation.messages[1]
    assert (message.content, message.weight) == ("of value", 0.0)


def test_a_path_that_ends_in_a_question_mark_is_taken_where_it_leads_to_something():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    last = {"role": "assistant", "content": "b", "w": {"loss": 0.5}}
    fields = {"messages[].weight": "w.loss", "system": "$.meta.system"}
    with pytest.raises(RecordError) as refusal:
        reconcile({"messages": [*turns, last]}, parse_reading({"fields": fields}))
    assert refusal.value.code == "missing_field"
    reading = parse_reading({"fields": {field: f"{path}?" for field, path in fields.items()}})
    reconciled = reconcile({"messages": [*turns, last]}, reading)
    assert [message.weight for message in reconciled.conversation.messages] == [1.0, 1.0, 0.5]
    assert reconciled.place(2, "weight") == "$.messages[2].w.loss"
    first = reconcile({"messages": [*turns, last], "meta": {"system": "s"}}, reading).conversation.messages[0]
    assert (first.role, first.content) == ("system", "s")


def test_what_an_optional_path_lacks_may_stand_under_another_name():
    reading = {"fields": {"messages[].content": "text?", "prompt": "$['q?']", "completion": "$.reply?"}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "text": "a", "content": "not this"}]
    assert said({"messages": turns}, fields={"messages[].content": "text?"}) == [("user", "q"), ("assistant", "a")]
    assert said({"q?": "q", "answer": "a"}, **reading) == [("user", "q"), ("assistant", "a")]


def test_tools_and_a_system_turn_may_be_mapped_from_within_the_conversation():
    turns = [{"role": "system", "content": "s", "tools": [{"name": "f"}]}, {"role": "assistant", "content": "a"}]
    fields = {"tools": "$.messages[0].tools", "system": "$.messages[0].content"}
    conversation = reconcile({"messages": turns}, parse_reading({"fields": fields})).conversation
    assert [message.content for message in conversation.messages] == ["s", "a"]
    assert conversation.tools == ({"name": "f"},)


def test_a_recipe_may_force_a_format():
    messages = [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]
    record = {"messages": messages, "prompt": "q", "completion": "a"}
    assert said(record, format="prompt_completion") == [("user", "q"), ("assistant", "a")]


def test_a_recipe_may_map_fields_by_their_path_and_roles_by_name():
    record = {
        "data": {"turns": [{"who": "Customer", "text": "q", "at": 1}, {"who": "Agent", "text": "a", "at": 2}]},
        "note": {"system": ["s"]},
    }
    reading = {
        "format": "openai",
        "fields": {
            "messages": "$.data.turns",
            "messages[].role": "who",
            "messages[].content": "$.text",
            "system": "note.system[0]",
        },
        "roles": {"Customer": "user", "Agent": "assistant"},
    }
    assert said(record, **reading) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    reconciled = reconcile(record, parse_reading(reading))
    assert [reconciled.place(number, "content") for number in range(3)] == [
        "$.note.system[0]",
        "$.data.turns[0].text",
        "$.data.turns[1].text",
    ]
    assert reconciled.place(2, "role") == "$.data.turns[1].who"
    del record["data"]["turns"][1]["text"]
    with pytest.raises(RecordError) as refusal:
        reconcile(record, parse_reading(reading))
    assert (refusal.value.code, refusal.value.path) == ("missing_field", "$.data.turns[1].text")
    del record["note"]["system"]
    with pytest.raises(RecordError) as refusal:
        reconcile(record, parse_reading(reading))
    assert (refusal.value.code, refusal.value.path) == ("missing_field", "$.note.system[0]")


def test_what_is_wrong_in_a_mapped_record_is_named_as_its_author_wrote_it():
    reading = parse_reading(
        {
            "fields": {"messages": "$.turns", "messages[].role": "meta.who", "tools": "$['a.b'][0]"},
            "roles": {"Agent": "assistant"},
        }
    )
    turns = [{"meta": {"who": "user"}, "content": "q"}, {"meta": {"who": "Agent"}, "content": "a"}]
    record = {"turns": turns, "a.b": [[]]}
    assert len(reconcile(record, reading).conversation.messages) == 2
    turns[1]["tool_calls"] = [{"function": {}}]
    assert refused(record, reading) == ("bad_tool_calls", "$.turns[1].tool_calls[0]")
    turns[1]["meta"]["who"] = "Agnt"
    assert refused(record, reading) == ("unknown_role", "$.turns[1].meta.who")
    record["a.b"] = [[5]]
    del turns[1]
    turns.append({"meta": {"who": "Agent"}, "content": "a"})
    assert refused(record, reading) == ("bad_tools", "$['a.b'][0]")


def refused(record, reading) -> tuple[str, str]:
    with pytest.raises(RecordError) as refusal:
        reconcile(record, reading)
    return refusal.value.code, refusal.value.path


def test_the_fields_of_a_mapped_source_are_reported_as_its_author_wrote_them():
    reading = parse_reading(
        {"fields": {"messages": "$.x.turns", "messages[].role": "who", "messages[].content": "said"}}
    )
    judge = Judge("f.jsonl", reading)
    line = b'{"x":{"turns":[{"who":"user","said":"q","at":1},{"who":"assistant","said":"a"}]},"id":7}'
    assert isinstance(judge(RawRecord(data=line, line=1, byte_offset=0)), Judged)
    uses = {use.path: use.target for use in field_uses([judge.field_counts()], reading) if use.path}
    assert uses == {
        "x.turns": "messages",
        "x.turns[].who": "messages[].role",
        "x.turns[].said": "messages[].content",
        "x.turns[].at": None,
        "id": None,
    }
    found = {(finding.code, finding.path) for finding in judge.unused.values()}
    assert found == {("unused_field", "$.x.turns[].at"), ("unused_field", "$.id")}
    twice = judge(RawRecord(data=line.replace(b'"id"', b'"system":"s","system"'), line=2, byte_offset=0))
    assert isinstance(twice, Finding)
    assert twice.code == "duplicate_key_in_message", "a field that is not mapped may be read all the same"


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        ({"format": "opnai"}, "openai"),
        ({"format": "alpaca", "fields": {"instrction": "$.q"}}, "instruction"),
        ({"fields": {"prompt": "$..q"}}, "JSON path"),
        ({"fields": ["prompt"]}, "mapping"),
        ({"roles": {"Agent": "bot"}}, "assistant"),
    ],
    ids=["format", "field", "path", "list", "role"],
)
def test_a_mapping_that_cannot_be_is_refused(reading, said):
    with pytest.raises(SetupError) as refusal:
        parse_reading(reading)
    assert said in f"{refusal.value.message} {refusal.value.remedy}"
