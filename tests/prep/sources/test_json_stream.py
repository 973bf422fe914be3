from __future__ import annotations

import json
import tracemalloc
from unittest import mock

import msgspec
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dft_prep.sources import json_stream
from dft_prep.sources.json_stream import Piece, split_values

TEXTS = st.text(max_size=12) | st.sampled_from(['"', "\\", '\\"', "]", "}, {", "\n", "\u2028", '"}]', "\\\\"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)
INDENTS = st.sampled_from([None, 0, 1, 4])


KEPT = 8


def split(data: bytes, kind, size: int, largest: int = 1 << 30) -> list[Piece]:
    """The pieces of `data` when it comes in chunks of `size`, and is looked at as soon as that much is there."""
    chunks = (data[at : at + size] for at in range(0, len(data), size))
    with mock.patch.object(json_stream, "_CHUNK", size):
        return list(split_values(chunks, kind, largest=largest, kept=KEPT))


def check_places(data: bytes, pieces: list[Piece]) -> None:
    for piece in pieces:
        assert data[piece.offset : piece.offset + len(piece.data)] == piece.data
        assert piece.line == data.count(b"\n", 0, piece.offset) + 1
        in_line = data[data.rfind(b"\n", 0, piece.offset) + 1 : piece.offset]
        assert piece.column == sum(byte & 0xC0 != 0x80 for byte in in_line) + 1


@settings(max_examples=200)
@given(st.lists(VALUES, max_size=6), INDENTS, st.booleans(), st.integers(1, 40))
@example([{"a": "\\"}, {"b": '"'}], None, True, 1)
def test_the_elements_of_an_array_are_those_of_json_loads_for_any_chunk_size(values, indent, ascii_only, size):
    data = b" \r\n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode() + b"\n"
    pieces = split(data, "array", size)
    assert [json.loads(piece.data) for piece in pieces] == values
    assert not any(piece.cut or piece.problem for piece in pieces)
    check_places(data, pieces)


@settings(max_examples=100)
@given(st.lists(OBJECTS, max_size=5), INDENTS, st.sampled_from([b"", b"\n", b" \r\n\n"]), st.integers(1, 40))
def test_objects_one_after_another_come_whole_for_any_chunk_size(values, indent, between, size):
    data = between.join(json.dumps(value, indent=indent).encode() for value in values)
    pieces = split(data, "object", size)
    assert [json.loads(piece.data) for piece in pieces] == values
    check_places(data, pieces)


@settings(max_examples=200)
@given(st.binary(max_size=60), st.sampled_from(["array", "object"]), st.integers(1, 9))
@example(b'[{"a', "array", 1)
@example(b'{"a": [}', "object", 3)
@example(b'[{"a": "x\n},\n {', "array", 2)
def test_any_bytes_end_and_every_piece_stands_where_it_says(junk, kind, size):
    data = (b"[" if kind == "array" else b"") + junk
    check_places(data, split(data, kind, size))


@settings(max_examples=100)
@given(st.lists(OBJECTS, min_size=1, max_size=4), st.data(), st.integers(1, 30))
def test_a_cut_array_keeps_what_came_before_the_cut(values, data, size):
    whole = json.dumps(values, indent=1).encode()
    cut = whole[: data.draw(st.integers(1, len(whole) - 1))]
    pieces = split(cut, "array", size)
    assert pieces[-1].cut
    complete = [json.loads(piece.data) for piece in pieces if not piece.cut]
    assert complete == values[: len(complete)]


GOOD = b'{"messages": [{"role": "user"}]}'
BROKEN = {
    "a comma too many": b'{"messages": [{"role": "user"},]}',
    "an open bracket": b'{"messages": [{"role": "user"}}',
    "an open brace": b'{"messages": [{"role": "user"]}',
    "a bracket too many": b'{"messages": [{"role": "user"}]]}',
    "a brace too many": b'{"messages": [{"role": "user"}]}}',
    "an open string": b'{"messages": [{"role": "user}]}',
    "a raw newline": b'{"messages": [{"role": "us\ner"}]}',
    "invalid UTF-8": b'{"messages": [{"role": "\xff\xfe"}]}',
    "no JSON at all": b"oops",
    "single quotes": b"{'messages': []}",
}


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_broken_element_leaves_its_neighbours_alone(broken, place, size):
    elements = [GOOD, GOOD]
    elements.insert(place, broken)
    data = b"[\n  " + b",\n  ".join(elements) + b"\n]\n"
    pieces = split(data, "array", size)
    assert [piece.data for piece in pieces] == elements
    assert not any(piece.cut or piece.problem for piece in pieces)
    check_places(data, pieces)


UNCLOSED = {
    "an end": b'{"messages": [{"role": "user"}',
    "a bracket and an end": b'{"messages": [{"role": "user"',
    "a brace of a field": b'{"messages": [{"role": "user"}], "meta": {}',
    "everything": b'{"messages": [{',
    "a bracket too many": b'{"messages": [{"role": "user"}]]}',
    "a hundred thousand brackets": b'{"messages": ' + b"[" * 100_000 + b"}",
}
BETWEEN = {"lines": (b"[\n  ", b",\n  ", b"\n]\n"), "flush lines": (b"[", b",\n", b"]"), "a line": (b"[", b", ", b"]")}


@pytest.mark.parametrize("size", [7, 1 << 20])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("name", UNCLOSED)
def test_an_element_that_nothing_closes_leaves_its_neighbours_alone(name, between, size):
    begin, separator, end = BETWEEN[between]
    broken = UNCLOSED[name] + (b"}" if between == "a line" else b"")
    if len(broken) > 1000 and size < 1000:
        broken = broken.replace(b"[" * 99_000, b"")
    elements = [GOOD, broken, GOOD, GOOD, broken, GOOD]
    pieces = split(begin + separator.join(elements) + end, "array", size)
    assert [piece.data for piece in pieces] == elements
    assert not any(piece.cut or piece.problem for piece in pieces)


def test_elements_that_nothing_closes_are_found_in_linear_time():
    broken = UNCLOSED["an end"] + b" " * 2000
    pieces = split(b"[" + b",\n".join([broken, GOOD] * 5000) + b"]", "array", 1 << 16)
    assert sum(piece.data == GOOD for piece in pieces) == 5000
    assert len(pieces) == 10_000


@pytest.mark.parametrize("broken", ["a comma too many", "an open bracket", "an open brace", "a brace too many"])
def test_even_on_one_line_where_brackets_can_be_told(broken):
    pieces = split(b"[" + b", ".join([GOOD, BROKEN[broken], GOOD]) + b"]", "array", 11)
    assert [piece.data for piece in pieces] == [GOOD, BROKEN[broken], GOOD]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1,]", "comma"),
        (b"[,1]", "comma"),
        (b"[1,,1]", "comma"),
        (b"[1]\n[2]", "text after"),
        (b"[1] x", "text after"),
        (b"[1", "not closed"),
        (b"[1,", "not closed"),
    ],
)
def test_what_is_wrong_between_elements_is_said_and_the_elements_are_kept(text, message):
    pieces = split(text, "array", 2)
    assert [piece.data for piece in pieces if not piece.problem] == [b"1"] * text.count(b"1")
    (problem,) = [piece.problem for piece in pieces if piece.problem]
    assert message in problem


def test_an_element_far_larger_than_a_chunk_takes_linear_time_and_is_whole():
    value = {"text": "x\\" * 500_000, "list": [{"n": n} for n in range(50_000)]}
    data = json.dumps([value, value]).encode()
    assert [json.loads(piece.data) for piece in split(data, "array", 4096)] == [value, value]


def test_a_guessed_end_is_only_taken_where_the_element_ends():
    """The text between two elements stands inside them too, in a string and between objects of a list."""
    value = {"text": '"}, {"', "more": '},\n {"x"', "list": [{"a": "}"}, {"b": "{"}]}
    for separator in (b", ", b",\n ", b","):
        data = b"[" + separator.join([json.dumps(value).encode()] * 30) + b"]"
        assert [json.loads(piece.data) for piece in split(data, "array", 1 << 18)] == [value] * 30


def shortened(piece: Piece, largest: int) -> Piece:
    """What is handed on of a piece where no more than `largest` bytes may be."""
    return piece if piece.size <= largest else msgspec.structs.replace(piece, data=piece.data[:KEPT])


def begins_like_what_is_inside(value: dict) -> bool:
    """Whether an object within `value` begins with the key that `value` begins with."""

    def heads(inner: object) -> list[str]:
        if isinstance(inner, list):
            return [head for item in inner for head in heads(item)]
        if isinstance(inner, dict):
            return [*list(inner)[:1], *heads(list(inner.values()))]
        return []

    return any(head == next(iter(value)) for head in heads(list(value.values())))


@settings(max_examples=100)
@given(st.lists(OBJECTS, max_size=4), INDENTS, st.booleans(), st.integers(1, 30), st.integers(KEPT, 60))
@example([{"a": "é\\" * 30}, {"b": "x" * 90}], None, False, 1, 10)
@example([{"a": "x" * 90}, {}], 1, True, 3, 40)
def test_only_elements_that_are_too_large_are_shortened(values, indent, ascii_only, size, largest):
    # Too large to be parsed, such a value may be taken for one that broke, and what begins inside for the next.
    assume(not any(begins_like_what_is_inside(value) for value in values))
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    objects = "\n".join(json.dumps(value, indent=indent, ensure_ascii=ascii_only) for value in values)
    for kind, data in (("array", text.encode()), ("object", objects.encode())):
        whole = split(data, kind, size)
        assert [json.loads(piece.data) for piece in whole] == values
        assert split(data, kind, size, largest) == [shortened(piece, largest) for piece in whole]


@settings(max_examples=200)
@given(st.binary(max_size=80), st.sampled_from(["array", "object"]), st.integers(1, 9), st.integers(KEPT, 30))
@example(b'{"a": "' + b"x" * 40 + b"\n}, {", "array", 1, 10)
def test_any_bytes_end_where_some_values_are_too_large(junk, kind, size, largest):
    data = (b"[" if kind == "array" else b"") + junk
    pieces = split(data, kind, size, largest)
    check_places(data, pieces)
    assert all(len(piece.data) == (KEPT if piece.size > largest else piece.size) for piece in pieces)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_element_that_is_too_large_leaves_its_neighbours_alone(broken):
    large = broken.replace(b"user", b"user" * 50).replace(b"oops", b"oops" * 50) + b" " * (200 * (broken[:1] == b"{"))
    large = large.replace(b"'messages'", b"'" + b"m" * 200 + b"'").replace(b"\xff", b"\xff" * 200).rstrip()
    large = large.replace(b"us\ner", b"us" * 50 + b"\ner")
    data = b"[\n  " + b",\n  ".join([GOOD, large, GOOD]) + b"\n]\n"
    first, second, third = split(data, "array", 7, 100)
    assert (first.data, third.data) == (GOOD, GOOD)
    assert (second.data, second.size) == (large[:KEPT], len(large))
    check_places(data, [first, second, third])


LONG = {
    "text": b'{"a": "' + b"x" * 4_000_000 + b'"}',
    "escapes": b'{"a": "' + (b'\\"\\\\' + b"x" * 36) * 100_000 + b'"}',
    "a list": b'{"a": [' + b"1, " * 1_300_000 + b"1]}",
    "brackets": b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a scalar": b"9" * 4_000_000,
    "lines": b'{"a": [\n' + b'"x",\n' * 800_000 + b'"x"\n]}',
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("kind", ["array", "object"])
def test_what_is_too_large_is_passed_over_in_little_memory(name, kind):
    data = LONG[name]
    whole = (
        b"[" + GOOD + b",\n" + data + b",\n" + GOOD + b"]" if kind == "array" else GOOD + b"\n" + data + b"\n" + GOOD
    )
    chunks = (whole[at : at + 65536] for at in range(0, len(whole), 65536))
    tracemalloc.start()
    try:
        first, large, last = split_values(chunks, kind, largest=100_000, kept=KEPT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (first.data, last.data, large.size, large.data) == (GOOD, GOOD, len(data), data[:KEPT])
    assert peak < 2_000_000


def test_a_text_that_is_never_closed_is_not_held_to_the_end_of_the_file():
    whole = b'[{"a": "\n' + b"x\n" * 2_000_000
    chunks = (whole[at : at + 65536] for at in range(0, len(whole), 65536))
    tracemalloc.start()
    try:
        (piece,) = split_values(chunks, "array", largest=100_000, kept=KEPT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert piece.cut
    assert piece.size > 3_900_000
    assert peak < 1_500_000
