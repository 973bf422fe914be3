from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dft_common.records import Conversation, Message, ToolCall
from dft_prep.codes.table import CODES
from dft_prep.judge.rules import SHORTEST_REPEATED, find_oddities

LONG = "Paris is the capital of France."


def talk(*turns: tuple[str, str] | Message) -> Conversation:
    messages = (turn if isinstance(turn, Message) else Message(role=turn[0], content=turn[1]) for turn in turns)  # pyright: ignore[reportArgumentType]
    return Conversation(messages=tuple(messages))


def raw_of(conversation: Conversation, *, ascii_only: bool) -> bytes:
    """The record as its author may have written it."""
    messages = [{"role": m.role, "content": m.content, "reasoning": m.reasoning} for m in conversation.messages]
    return json.dumps({"messages": messages}, ensure_ascii=ascii_only).encode()


def found_in(*turns: tuple[str, str] | Message) -> list[tuple[str, int, str]]:
    """(code, message, part) of each oddity, the same however the record is written."""
    conversation = talk(*turns)
    found = find_oddities(conversation)
    for ascii_only in (True, False):
        assert find_oddities(conversation, raw_of(conversation, ascii_only=ascii_only)) == found
    assert all(CODES[odd.code].scope == "rule" and odd.found for odd in found)
    return [(odd.code, odd.message_index, odd.part) for odd in found]


Q, A, S, D = ("user", "q"), ("assistant", "a"), ("system", "s"), ("developer", "d")
CALL = Message(role="assistant", content="", tool_calls=(ToolCall(name="f", arguments="{}"),))
RESULT = ("tool", "1")

ODD = {
    "ends with a user": ([Q, A, Q], [("no_reply_at_end", 2, "")]),
    "ends with a result": ([Q, CALL, RESULT], [("no_reply_at_end", 2, "")]),
    "ends with a system turn": ([Q, A, S], [("system_not_first", 2, "role"), ("no_reply_at_end", 2, "")]),
    "an empty reply": ([Q, ("assistant", ""), Q, A], [("empty_reply", 1, "content")]),
    "a reply of white space": ([Q, ("assistant", " \n\u3000")], [("empty_reply", 1, "content")]),
    "a system turn after a user's": ([Q, S, A], [("system_not_first", 1, "role")]),
    "a developer turn after a reply": ([S, Q, A, D, Q, A], [("system_not_first", 3, "role")]),
    "two users": ([Q, Q, A], [("users_in_a_row", 1, "role")]),
    "three users are one finding": ([Q, Q, Q, A], [("users_in_a_row", 1, "role")]),
    "two runs are two findings": ([Q, Q, A, Q, Q, A], [("users_in_a_row", 1, "role"), ("users_in_a_row", 4, "role")]),
    "two assistants": ([Q, A, ("assistant", "b")], [("assistants_in_a_row", 2, "role")]),
    "two assistants, one of them context": (
        [Q, Message(role="assistant", content="a", weight=0), ("assistant", "b")],
        [("assistants_in_a_row", 2, "role")],
    ),
    "the question as its reply": ([("user", "why?"), ("assistant", "why?")], [("reply_equals_question", 1, "content")]),
    "the question within white space": (
        [("user", " why?\n"), ("assistant", "\twhy?")],
        [("reply_equals_question", 1, "content")],
    ),
    "a reply twice": ([Q, ("assistant", LONG), Q, ("assistant", f"{LONG}\n")], [("repeated_reply", 3, "content")]),
    "the shortest that counts": (
        [Q, ("assistant", "x" * SHORTEST_REPEATED), Q, ("assistant", "x" * SHORTEST_REPEATED)],
        [("repeated_reply", 3, "content")],
    ),
    "a control character in a question": ([("user", "\x1b[31m"), A], [("control_characters", 0, "content")]),
    "a control character in reasoning": (
        [Q, Message(role="assistant", content="a", reasoning="\f")],
        [("control_characters", 1, "reasoning")],
    ),
    "LaTeX that lost its backslash": ([Q, ("assistant", "\frac{1}{2}")], [("control_characters", 1, "content")]),
    "the same behind a line's end": ([Q, ("assistant", "\\\\\frac{1}{2}")], [("control_characters", 1, "content")]),
}
PLAIN = {
    "one turn": [A],
    "an ordinary conversation": [S, Q, A, ("user", "and?"), ("assistant", "b")],
    "system and developer in front": [S, D, Q, A],
    "an assistant first": [A, Q, ("assistant", "b")],
    "an empty question": [("user", ""), A],
    "a turn that only calls": [Q, CALL, RESULT, A],
    "a turn that only reasons": [Q, Message(role="assistant", content="", reasoning="because")],
    "assistants around a result": [Q, CALL, RESULT, ("assistant", "b"), Q, A],
    "a reply that holds the question": [("user", "why?"), ("assistant", "why? because")],
    "the question of another turn": [("user", "why?"), A, Q, ("assistant", "why?")],
    "a short reply twice": [Q, ("assistant", "Yes, it is."), Q, ("assistant", "Yes, it is.")],
    "replies of one length": [Q, ("assistant", LONG), Q, ("assistant", LONG[::-1])],
    "the same words before other calls": [
        *(Q, Message(role="assistant", content=LONG, tool_calls=CALL.tool_calls), RESULT, A),
        *(Q, Message(role="assistant", content=LONG, tool_calls=CALL.tool_calls), RESULT, ("assistant", "b")),
    ],
    "tabs, lines, LaTeX and Chinese": [
        ("user", "\\frac\\begin\\underline \\\\u0007\t\r\n«é»"),
        ("assistant", "首先，\u2028😀"),
    ],
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_conversation_is_found_where_it_is_odd(name):
    turns, expected = ODD[name]
    assert found_in(*turns) == expected


@pytest.mark.parametrize("name", PLAIN)
def test_an_ordinary_conversation_is_not(name):
    assert found_in(*PLAIN[name]) == []


def test_a_finding_quotes_what_it_found():
    found = find_oddities(talk(("user", "why?" * 50), ("assistant", "why?" * 50), Q, Q))
    assert "why?why?" in found[0].found
    assert len(found[0].found) < 120
    assert [odd.found for odd in found[1:]] == ["2 user turns in a row", "ends with a user turn"]
    (odd,) = find_oddities(talk(Q, ("assistant", "ab\0c\x7f\x85")))
    assert odd.found == "holds U+0000 at character 3, and 2 more"


def test_a_million_oddities_are_some_and_a_count():
    found = find_oddities(talk(*[Q, ("assistant", "")] * 1000))
    assert [odd.code for odd in found] == ["empty_reply"] * 20
    assert "980 more" in found[-1].found


# Characters: by Unicode's own tables, whatever the bytes look like.


def unwanted(character: str) -> bool:
    number = ord(character)
    return (unicodedata.category(character) == "Cc" and character not in "\t\n\r") or (
        number & 0xFFFE == 0xFFFE or 0xFDD0 <= number <= 0xFDEF
    )


BORDERS = [*range(0x180), *range(0xFDC0, 0xFE00), *range(0xFFF0, 0x10003), 0x2028, 0x20AC, 0xFEFF, 0xF7FF, 0x1F600]
BORDERS += [plane * 0x10000 + low for plane in range(1, 17) for low in (0xFDD0, 0xFFBE, 0xFFFD, 0xFFFE, 0xFFFF)]


def test_every_control_character_and_noncharacter_is_found_and_no_other():
    for character in map(chr, BORDERS):
        for before in ("", "\\", "\\\\", "\n首，"):
            found = found_in(Q, ("assistant", f"a{before}{character}z"))
            assert found == [("control_characters", 1, "content")] * unwanted(character), ascii(before + character)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["\\", "u", "0007", "b", "f", "\x07", "\b", "é", "\x85", "，", "\ufdd0", "\n", '"', "😀"]))
)
@example(["\\", "\\", "\b"])
@example(["\\", "\x07"])
@example(["\\", "u", "0007"])
def test_no_writing_of_a_record_hides_a_control_character(pieces):
    text = "".join(pieces)
    found = found_in(Q, ("assistant", f"x{text}"))
    assert bool(found) == any(map(unwanted, text))


TURNS = st.tuples(
    st.sampled_from(["system", "user", "assistant"]), st.sampled_from(["", "q", "a", f" {LONG}", LONG, " q"])
)


@settings(max_examples=300)
@given(st.lists(TURNS, min_size=1, max_size=7))
def test_the_quick_look_lets_nothing_pass_that_the_rules_find(turns):
    """As `found_in`, and against the rules said in another way."""
    found = found_in(*turns)
    roles = [role for role, _ in turns]
    texts = [text.strip() for _, text in turns]
    replies = [at for at, role in enumerate(roles) if role == "assistant"]
    expected = {("empty_reply", at) for at in replies if not texts[at]}
    expected |= {
        ("reply_equals_question", at)
        for at in replies
        if texts[at] and at and roles[at - 1] == "user" and texts[at - 1] == texts[at]
    }
    expected |= {
        ("repeated_reply", at)
        for at in replies
        if texts[at] == LONG and any(texts[other] == LONG for other in replies if other < at)
    }
    expected |= {
        (f"{role}s_in_a_row", at)
        for at, role in enumerate(roles)
        if role != "system" and roles[at - 1 : at] == [role] and roles[max(0, at - 2) : at] != [role, role]
    }
    expected |= {
        ("system_not_first", at) for at, role in enumerate(roles) if role == "system" and {*roles[:at]} - {role}
    }
    expected |= {("no_reply_at_end", len(roles) - 1)} if roles[-1] != "assistant" else set()
    assert {(code, at) for code, at, _ in found} == expected
    assert len(found) == len(expected)
    assert [at for _, at, _ in found] == sorted(at for _, at, _ in found)
