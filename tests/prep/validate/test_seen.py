from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from dft_common.records import Conversation, Message, ToolCall
from dft_prep.shards.split import conversation_key, same_key
from dft_prep.validate import seen
from dft_prep.validate.seen import Seen, seen_rows


def fill(units: list[list[int]]) -> Seen:
    found = Seen()
    for number in reversed(range(len(units))):  # units finish in any order
        keys = [bytes([key]) * 16 for key in units[number]]
        lines = array("q", range(1, len(keys) + 1))
        rows = seen_rows(keys, lines, array("q", (10 * line for line in lines)))
        rows["unit"] = number
        found.add(rows)
    return found


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=5), st.integers(0, 8), st.booleans())
def test_every_record_whose_conversation_came_before_is_found_in_order(units, most, spilled):
    before: dict[int, tuple[int, int]] = {}
    expected = []
    for number, keys in enumerate(units):
        for line, key in enumerate(keys, 1):
            if key in before:
                expected.append(((number, line), before[key]))
            before.setdefault(key, (number, line))
    held, seen._HELD_BYTES = seen._HELD_BYTES, 100 if spilled else seen._HELD_BYTES
    try:
        count, found = fill(units).count_and_first(most)
    finally:
        seen._HELD_BYTES = held
    assert count == len(expected)
    places = [tuple((int(row["unit"]), int(row["line"])) for row in duplicate) for duplicate in found]
    assert places == expected[:most]


CALLS = st.lists(
    st.builds(
        ToolCall,
        name=st.sampled_from("fg"),
        arguments=st.sampled_from(["{}", "[]"]),
        id=st.none() | st.just("1"),
        verbatim=st.none() | st.just("{}"),
    ),
    max_size=2,
).map(tuple)
MESSAGES = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["user", "assistant"]),
        content=st.sampled_from(["", "a"]),
        reasoning=st.none() | st.just("r"),
        tool_calls=st.just(()) | CALLS,
        name=st.none() | st.just("n"),
        tool_call_id=st.none() | st.just("1"),
        weight=st.sampled_from([1.0, 0.0]).map(lambda weight: float(str(weight))),  # an object of its own
    ),
    min_size=1,
    max_size=2,
).map(tuple)
CONVERSATIONS = st.builds(Conversation, messages=MESSAGES, tools=st.just(()) | st.just(({"name": "f"},)))


@settings(max_examples=400)
@given(CONVERSATIONS, CONVERSATIONS)
def test_the_quick_key_tells_apart_what_a_build_tells_apart(one, other):
    assert (same_key(one) == same_key(other)) == (conversation_key(one) == conversation_key(other))
