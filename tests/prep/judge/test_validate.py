from __future__ import annotations

import base64
import json
import math

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dft_common.records import Conversation, Finding
from dft_prep.codes.table import CODES
from dft_prep.judge.judgement import Judge, Judged, quarantine_line
from dft_prep.sources.named import resolve_sources
from dft_prep.sources.readers import RawRecord, UnitReader
from dft_prep.sources.units import plan_units

HEAD = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
GOOD = HEAD + b"}"


def with_meta(text: bytes) -> bytes:
    """A good record with `text` as the value of a field that is not used."""
    return HEAD + b', "meta": ' + text + b"}"


def look(data, **fields) -> Judged | Finding:
    return Judge("a.jsonl")(RawRecord(line=7, byte_offset=100, data=data, **fields))


LEGAL = {
    "duplicate keys": b'{"a": 1, "a": 2}',
    "a number beyond the range of a float": b"1e400",
    "a tiny number": b"1e-400",
    "an integer of 30 digits": b"1" * 30,
    "an integer of 6000 digits": b"-" + b"1" * 6000,
    "minus zero": b"-0",
    "half a surrogate pair": b'"\\ud800"',
    "half a surrogate pair as a key": b'{"\\udc00": 1}',
    "NUL, escaped": b'"\\u0000"',
    "DEL": b'"\x7f"',
    "noncharacters": '"\uffff\U0010ffff"'.encode(),
    "U+2028": '"\u2028\u2029\x85"'.encode(),
    "white space": b" [\t1\r, 2 ] ",
    "a hundred levels": b"[" * 100 + b"]" * 100,
}
ILLEGAL = {
    "a trailing comma": (b"[1,]", "trailing_comma"),
    "a trailing comma in an object": (b'{"a": 1 , }', "trailing_comma"),
    "a comment": (b"1 /* x */", "json_comment"),
    "a comment to the line's end": (b"1 // x", "json_comment"),
    "a comment of a shell": (b"[ # x", "json_comment"),
    "single quotes": b"'x'",
    "a raw tab in a string": b'"\t"',
    "NUL, raw": (b'"\0"', "nul_bytes"),
    "a leading zero": b"01",
    "a plus": b"+1",
    "a bare point": b"1.",
    "hex": b"0x1",
    "a bad escape": b'"\\x41"',
    "a short escape": b'"\\u12"',
    "True": b"True",
    "undefined": b"undefined",
    "a form feed": b"\x0c1",
    "a no-break space": "\u00a01".encode(),
    "a stray bracket": b"[1]]",
    "two values": b"1 2",
    "nothing": b"",
    "NaN": (b"NaN", "nan"),
    "Infinity": (b"Infinity", "nan"),
    "-Infinity": (b"-Infinity", "nan"),
    "an overlong encoding": (b'"\xc0\x80"', "invalid_utf8"),
    "an encoded surrogate": (b'"\xed\xa0\x80"', "invalid_utf8"),
    "beyond Unicode": (b'"\xf4\x90\x80\x80"', "invalid_utf8"),
    "Latin-1": (b'"caf\xe9"', "invalid_utf8"),
    "20,000 levels": (b"[" * 20_000 + b"]" * 20_000, "too_deep"),
    "20,000 open brackets": (b"[" * 20_000, "too_deep"),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_json_is_taken_even_where_a_decoder_does_not_like_it(name):
    judge = Judge("a.jsonl")
    judged = judge(RawRecord(line=7, byte_offset=100, data=with_meta(LEGAL[name])))
    assert isinstance(judged, Judged), judged
    assert [message.content for message in judged.conversation.messages] == ["q", "a"]
    assert list(judge.unused) == ["meta"]


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_is_no_json_is_refused_by_the_clause_it_breaks(name):
    case = ILLEGAL[name]
    value, code = case if isinstance(case, tuple) else (case, "invalid_json")
    finding = look(with_meta(value))
    assert isinstance(finding, Finding), finding
    assert (finding.code, finding.severity, finding.file, finding.line) == (code, "error", "a.jsonl", 7)
    assert finding.byte_offset == 100
    assert finding.message and finding.help


def place(data: bytes, **fields) -> tuple[int, int]:
    finding = look(data, **fields)
    assert isinstance(finding, Finding)
    return finding.line, finding.column


def test_a_finding_in_the_bytes_names_the_line_and_the_character():
    assert place('{"é": "日本語", x}'.encode()) == (7, 14)
    assert place('{"é": "日'.encode() + b'\xff"}') == (7, 9)
    assert place(b'{\n  "a": 1,\n  "b": NaN\n}') == (9, 8)
    assert place(b'{\n  "a": 1,\n}') == (8, 9), "the comma"
    assert place(b'{"a": NaN}', column=5) == (7, 11)
    assert place(b'{\n"a": NaN}', column=5) == (8, 6)
    assert place(b'{"NaN": "NaN", "b": NaN}') == (7, 21), "the constant, not the text"


def test_the_bad_byte_itself_is_named():
    finding = look(b'{"a": "\xe9"}')
    assert isinstance(finding, Finding)
    assert "0xe9" in finding.message


@pytest.mark.parametrize("length", range(1, len(GOOD)))
def test_a_file_that_ends_inside_its_last_record_is_said_to_be_cut(length):
    finding = look(GOOD[:length], cut=True)
    assert isinstance(finding, Finding)
    assert finding.code == "cut_line"


def test_a_last_line_without_newline_is_cut_only_where_it_is_unfinished():
    assert isinstance(look(GOOD, cut=True), Judged)
    finding = look(with_meta(b"[1,]"), cut=True)
    assert isinstance(finding, Finding)
    assert finding.code == "trailing_comma"


HALF = {
    "content": b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
    "reasoning": b'{"messages": [{"role": "assistant", "content": "a", "reasoning": "\\udfff"}]}',
    "a call's id": b'{"messages": [{"role": "assistant", "tool_calls": [{"id": "\\ud800", "name": "f"}]}]}',
    "a tool": HEAD + b', "tools": [{"name": "\\ud800"}]}',
    "a part": b'{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "\\ud83dx"}]}]}',
}


@pytest.mark.parametrize("name", HALF)
def test_half_a_character_in_the_conversation_leaves_the_record_out(name):
    finding = look(HALF[name])
    assert isinstance(finding, Finding), finding
    assert finding.code == "lone_surrogate"


def test_whole_surrogate_pairs_are_characters():
    judged = look(GOOD.replace(b'"a"', b'"\\ud83d\\ude00"'))
    assert isinstance(judged, Judged)
    assert judged.conversation.messages[1].content == "😀"


def test_an_infinite_number_never_reaches_the_dataset():
    for record in (
        HEAD + b', "tools": [{"name": "f", "maximum": 1e999}]}',
        b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1e999}}]}]}',
    ):
        finding = look(record)
        assert isinstance(finding, Finding)
        assert finding.code in ("bad_tools", "bad_tool_calls")


def test_a_problem_of_the_file_is_a_finding_with_its_code():
    finding = look(b"x", problem=("truncated_compression", "the gzip stream is cut"))
    assert isinstance(finding, Finding)
    assert (finding.code, finding.message) == ("truncated_compression", "the gzip stream is cut")


def test_a_bad_conversation_names_its_path():
    finding = look(b'{"messages": [{"role": "bot ", "content": "x"}]}')
    assert isinstance(finding, Finding)
    assert finding.path == "$.messages[0].role"
    assert finding.message.startswith("got 'bot ', expected one of ")


@pytest.mark.parametrize(
    ("messages", "notes"),
    [
        ([("user", "q"), ("assistant", "a")], []),
        ([("user", "q"), ("assistant", "a"), ("user", "?")], ["no_reply_at_end"]),
        ([("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "a")], ["empty_reply"]),
        ([("user", ""), ("assistant", "a")], []),
    ],
)
def test_notes_keep_the_record(messages, notes):
    judged = look(json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}).encode())
    assert isinstance(judged, Judged)
    assert [note.code for note in judged.notes] == notes
    assert all(note.severity == "warning" for note in judged.notes)


@settings(max_examples=400)
@given(st.binary(max_size=80), st.integers(0, len(GOOD)), st.integers(0, 6), st.booleans())
@example(b"\xff", 20, 0, False)
@example(b"\\", 50, 1, True)
def test_mutated_bytes_never_raise_and_can_be_taken_back_from_the_quarantine(junk, at, removed, cut):
    data = GOOD[:at] + junk + GOOD[at + removed :]
    judged = look(data, cut=cut)
    if isinstance(judged, Judged):
        assert isinstance(judged.conversation, Conversation)
        msgspec.json.encode(judged.conversation)
        return
    assert judged.code in CODES
    line = quarantine_line(judged, RawRecord(line=7, byte_offset=100, data=data))
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    entry = msgspec.json.decode(line)
    raw = base64.b64decode(entry["raw_base64"]) if "raw_base64" in entry else entry["raw"].encode()
    assert raw == data
    assert {key: entry[key] for key in ("file", "line", "byte_offset", "code")} == {
        "file": "a.jsonl",
        "line": judged.line,
        "byte_offset": 100,
        "code": judged.code,
    }


def test_a_parquet_row_in_the_quarantine_is_json_text():
    row = {"messages": None, "x": b"\xff", "n": math.nan}
    raw = RawRecord(line=3, byte_offset=-1, data=row)
    finding = Judge("a.parquet")(raw)
    assert isinstance(finding, Finding)
    assert json.loads(json.loads(quarantine_line(finding, raw))["raw"])["messages"] is None


def test_a_raw_record_is_only_judged_never_changed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\r\n" + b"oops\r\n" + GOOD)
    (source,) = resolve_sources([str(path)])
    (unit,) = plan_units(source.files[0], "a")
    judged = list(map(Judge("a.jsonl"), UnitReader(unit)))
    assert [isinstance(each, Judged) for each in judged] == [True, False, True]
    assert isinstance(judged[1], Finding)
    assert (judged[1].line, judged[1].byte_offset) == (2, len(GOOD) + 2)
