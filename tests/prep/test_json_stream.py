from __future__ import annotations

import json
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dft_prep import json_stream
from dft_prep.json_stream import Piece, split_values

TEXTS = st.text(max_size=12) | st.sampled_from(['"', "\\", '\\"', "]", "}, {", "\n", "\u2028", '"}]', "\\\\"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)
INDENTS = st.sampled_from([None, 0, 1, 4])


def split(data: bytes, kind, size: int) -> list[Piece]:
    """The pieces of `data` when it comes in chunks of `size`, and is looked at as soon as that much is there."""
    chunks = (data[at : at + size] for at in range(0, len(data), size))
    with mock.patch.object(json_stream, "_CHUNK", size):
        return list(split_values(chunks, kind))


def check_places(data: bytes, pieces: list[Piece]) -> None:
    for piece in pieces:
        assert data[piece.offset : piece.offset + len(piece.data)] == piece.data
        assert piece.line == data.count(b"\n", 0, piece.offset) + 1


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=6), INDENTS, st.booleans(), st.integers(1, 40))
@example([{"a": "\\"}, {"b": '"'}], None, True, 1)
def test_the_elements_of_an_array_are_those_of_json_loads_for_any_chunk_size(values, indent, ascii_only, size):
    data = b" \r\n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode() + b"\n"
    pieces = split(data, "array", size)
    assert [json.loads(piece.data) for piece in pieces] == values
    assert not any(piece.cut or piece.problem for piece in pieces)
    check_places(data, pieces)


@settings(max_examples=100, deadline=None)
@given(st.lists(OBJECTS, max_size=5), INDENTS, st.sampled_from([b"", b"\n", b" \r\n\n"]), st.integers(1, 40))
def test_objects_one_after_another_come_whole_for_any_chunk_size(values, indent, between, size):
    data = between.join(json.dumps(value, indent=indent).encode() for value in values)
    pieces = split(data, "object", size)
    assert [json.loads(piece.data) for piece in pieces] == values
    check_places(data, pieces)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["array", "object"]), st.integers(1, 9))
@example(b'[{"a', "array", 1)
@example(b'{"a": [}', "object", 3)
@example(b'[{"a": "x\n},\n {', "array", 2)
def test_any_bytes_end_and_every_piece_stands_where_it_says(junk, kind, size):
    data = (b"[" if kind == "array" else b"") + junk
    check_places(data, split(data, kind, size))


@settings(max_examples=100, deadline=None)
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


def test_a_stretch_without_borders_is_not_kept_whole(monkeypatch):
    monkeypatch.setattr("dft_prep.json_stream._KEPT_OF_DAMAGE", 1000)
    (piece,) = split(b'[{"a": "\n' + b"x\n" * 500_000, "array", 1 << 16)
    assert piece.cut
    assert len(piece.data) < 1 << 19
