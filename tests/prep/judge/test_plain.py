"""The quick way for plain records gives what the ordinary way gives, on every record."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dft_common.records import Finding
from dft_prep.judge.judgement import Judge, Judged
from dft_prep.judge.plain import PlainReader
from dft_prep.sources.readers import RawRecord

PLAIN = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TEXT = st.text(alphabet='ab"\\\n\u2028é\x00{}:,', max_size=8)


def as_text(text: str, escape_marks: bool) -> str:
    written = json.dumps(text, ensure_ascii=False)
    return '"' + written[1:-1].replace('\\"', "\\u0022") + '"' if escape_marks else written


MESSAGES = st.lists(
    st.builds(
        lambda role, content, extra, marks: (
            f'{{"role": "{role}", "content": {"null" if content is None else as_text(content, marks)}{extra}}}'
        ),
        st.sampled_from(["user", "assistant", "system", "tool", "developer", "bot", "function"]),
        st.none() | TEXT,
        st.sampled_from(
            [
                "",
                ', "content": "b"',
                ', "weight": 0',
                ', "weight": 2',
                ', "name": "n"',
                ', "tool_calls": []',
                ', "tool_calls": [{"name": "f", "arguments": "{}"}]',
                ', "tool_calls": null',
                ', "reasoning": "r"',
                ', "verbatim": "v"',
                ', "c\\u006fntent": 1',
            ]
        ),
        st.booleans(),
    ),
    max_size=3,
)
FIELDS = st.lists(
    st.sampled_from(
        [
            '"id": 7',
            '"id": "x\\"y"',
            '"id": null',
            '"id": 1e400',
            '"meta": {"a": 1, "a": 2}',
            '"meta": {"a": ["\\u0022", "b"]}',
            '"meta": {"source": "gsm8k"}',
            '"conversations": null',
            '"prompt": "q"',
            '"completion": "a"',
            '"system": "s"',
            '"tools": []',
            '"messages": []',
            '"mess\\u0061ges": []',
        ]
    ),
    max_size=3,
)
RECORDS = st.builds(
    lambda fields, messages: "{" + ", ".join([*fields, f'"messages": [{", ".join(messages)}]']) + "}", FIELDS, MESSAGES
)


def outcome(judge: Judge, text: str):
    judged = judge(RawRecord(line=1, byte_offset=0, data=text.encode()))
    return judged if isinstance(judged, Finding) else (judged.conversation, judged.notes)


def ordinary() -> Judge:
    judge = Judge("a.jsonl")
    judge._plain = None
    return judge


def in_sharegpts_words(text: str) -> str:
    """The record as ShareGPT has it: its keys, and some of its roles."""
    words = {"messages": "conversations", "role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    for ours, theirs in words.items():
        text = text.replace(f'"{ours}"', f'"{theirs}"')
    return text


@settings(max_examples=400)
@given(
    st.lists(RECORDS, max_size=6),
    st.sampled_from(["", '"id": 3, ', '"id": 3, "meta": {}, ']),
    st.sampled_from([str, in_sharegpts_words]),
)
@example(['{"messages": [{"role": "user", "content": "\\u0022\\u0022", "content": "\\u0022\\u0022"}]}'], "", str)
@example(['{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}'], "", str)
@example(['{"messages": [{"role": "function_call", "content": "{}"}]}'], "", in_sharegpts_words)
def test_the_outcome_is_that_of_the_ordinary_way(texts, fields, words):
    quick, slow = Judge("a.jsonl"), ordinary()
    for text in map(words, ["{" + fields + json.dumps(PLAIN)[1:], *texts]):
        assert outcome(quick, text) == outcome(slow, text), text
    assert sorted(quick.field_counts()) == sorted(slow.field_counts())
    assert quick.unused == slow.unused


def test_plain_records_are_read_the_quick_way():
    reader = PlainReader()
    text = json.dumps({"id": 1, **PLAIN}).encode()
    assert reader.read(text) is None
    reader.learn(json.loads(text), "openai")
    conversation = reader.read(json.dumps({**PLAIN, "id": "x"}).encode())
    assert conversation is not None
    assert [message.content for message in conversation.messages] == ["q", "a"]
    assert reader.read(json.dumps(PLAIN).encode()) is None, "another set of fields is another kind"
    shared = json.loads(in_sharegpts_words(json.dumps(PLAIN)))
    reader.learn(shared, "sharegpt")
    assert reader.read(json.dumps(shared).encode()) == conversation


@pytest.mark.parametrize(
    ("field", "code"),
    [
        ('"messages": []', "duplicate_key_in_message"),
        ('"id": 2', "duplicate_keys"),
        ('"\\u0069d": 2', "duplicate_keys"),
    ],
)
def test_a_key_that_stands_twice_is_never_overlooked(field, code):
    judge = Judge("a.jsonl")
    first = json.dumps({"id": 1, **PLAIN})
    assert isinstance(judge(RawRecord(line=1, byte_offset=0, data=first.encode())), Judged)
    judged = judge(RawRecord(line=2, byte_offset=9, data=(first[:-1] + f", {field}}}").encode()))
    found = [judged] if isinstance(judged, Finding) else judged.notes
    assert [finding.code for finding in found] == [code]


def test_a_label_that_says_no_is_never_overlooked():
    judge = Judge("a.jsonl")
    labels = (True, True, None, 0, False, True)
    lines = [json.dumps({"id": number, "label": label, **PLAIN}) for number, label in enumerate(labels)]
    judged = [judge(RawRecord(line=1, byte_offset=0, data=line.encode())) for line in lines]
    bad = [(number, found) for number, found in enumerate(judged) if isinstance(found, Finding)]
    assert [(number, found.code, found.path) for number, found in bad] == [(4, "unwanted_reply", "$.label")]


@pytest.mark.parametrize(("levels", "good"), [(490, True), (520, False), (850, False), (1200, False)])
def test_how_deep_is_too_deep_does_not_depend_on_the_way_or_the_caller(levels, good):
    def judged(judge: Judge, text: str, frames: int):
        return judged(judge, text, frames - 1) if frames else judge(RawRecord(1, 0, text.encode()))

    deep = json.dumps(PLAIN)[:-1] + ', "meta": ' + "[" * levels + "]" * levels + "}"
    for frames in (0, 200):
        quick = Judge("a.jsonl")
        quick(RawRecord(1, 0, json.dumps({**PLAIN, "meta": 1}).encode()))
        for judge in (quick, ordinary()):
            found = judged(judge, deep, frames)
            assert isinstance(found, Judged) == good
            assert good or found.code == "too_deep"
